"""`python -m training`: demo | anchors | train | evaluate | import | export | article.

Errors that a user can mend are one line on stderr and exit code 2. A training that SIGTERM ends writes its checkpoint
and exits with 143.
"""

import argparse
import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from model.metadata import InvalidModel
from training.checkpoint import InvalidCheckpoint
from training.coco import InvalidDataSet, load_coco
from training.config import TrainConfig, add_flags, override
from training.presets import PRESETS
from training.stopping import EXIT_CODE, Terminated

USER_ERRORS = (InvalidCheckpoint, InvalidDataSet, InvalidModel, ValueError, OSError, RuntimeError)


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(format="%(levelname)s %(message)s")
    logging.getLogger("training").setLevel(logging.INFO)
    options = build_parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
    except Terminated as stopped:
        print(f"python -m training: {stopped}", file=sys.stderr)
        return EXIT_CODE
    except USER_ERRORS as error:
        text = " ".join(str(error).split())  # torch's messages have many lines
        print(f"python -m training: error: {text}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training", description=__doc__.splitlines()[0] if __doc__ else None
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_anchors(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_import(commands)
    _add_export(commands)
    _add_article(commands)
    return parser


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _command(commands, "demo", "draw a data set of shapes in COCO format", demo)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must hold no data set yet")
    parser.add_argument("--images", type=int, default=6000, help="training pictures")
    parser.add_argument("--validation-images", type=int, default=500, help="validation pictures")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes")


def _add_anchors(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _command(commands, "anchors", "whether a recipe's anchors fit a data set, and better ones", anchors)
    parser.add_argument("--data", type=Path, required=True, help="folder of a COCO-format data set")
    parser.add_argument("--split", choices=("train", "val"), default="train", help="whose objects")
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="recipe; every value has a flag of its own")
    add_flags(parser.add_argument_group("values of the preset"), TrainConfig)  # type: ignore[arg-type]


def _add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _command(commands, "train", "train RetinaNet on COCO-format data", train)
    parser.add_argument("--data", type=Path, required=True, help="folder of a COCO-format data set")
    parser.add_argument("--out", type=Path, required=True, help="run folder: last.pt, best.pt, metrics.jsonl, report/")
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="recipe; every value has a flag of its own")
    parser.add_argument(
        "--init",
        type=Path,
        metavar="CHECKPOINT.pt",
        help="start from its weights and architecture, with the data set's classes; `import` makes one of COCO's",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that load samples; 0: none")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument("--resume", action="store_true", help="go on from last.pt where there is one")
    add_flags(parser.add_argument_group("values of the preset"), TrainConfig)  # type: ignore[arg-type]


def _add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _command(commands, "evaluate", "COCO AP of a checkpoint or an ONNX file", evaluate)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of a COCO-format data set; its val split is used"
    )
    parser.add_argument("--model", type=Path, required=True, help="CHECKPOINT.pt or FILE.onnx")
    parser.add_argument("--images", type=int, default=0, help="only the first N pictures; 0: all")
    parser.add_argument(
        "--unreadable", choices=("stop", "skip"), default="stop", help="what a picture that cannot be read does"
    )
    parser.add_argument(
        "--scales",
        type=_sides,
        default=(),
        metavar="PX,PX,...",
        help="shorter sides of an image pyramid, such as 600,800,1000; default: the model's own size alone",
    )
    parser.add_argument(
        "--class-agnostic", action="store_true", help="what an object is called does not count, as of proposals"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")


def _sides(text: str) -> tuple[int, ...]:
    sides = text.split(",")
    if not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of sides above 0, such as 600,800,1000")
    return tuple(int(side) for side in sides)


def _add_import(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _command(commands, "import", "make a checkpoint of torchvision's RetinaNet weights", import_weights)
    parser.add_argument(
        "--arch", choices=("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"), required=True, help="torchvision's"
    )
    parser.add_argument(
        "--weights",
        required=True,
        metavar="coco|FILE.pth",
        help="coco: torchvision's own, downloaded to its cache; or a state dict",
    )
    parser.add_argument("--out", type=Path, required=True, help="CHECKPOINT.pt")
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="names of the columns: COCO's JSON (the categories; a column is an id), or text with a line for each "
        "column, from column 0 on; needed where the weights are not for COCO's 91",
    )
    parser.add_argument(
        "--norm-eps",
        type=float,
        metavar="X",
        help="epsilon of the backbone's batch norm; default: 0 for torchvision's v1 COCO weights, else 1e-5",
    )


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _command(commands, "export", "write the ONNX file that the service loads", export)
    parser.add_argument("--model", type=Path, required=True, help="CHECKPOINT.pt")
    parser.add_argument("--out", type=Path, required=True, help="FILE.onnx")
    parser.add_argument("--name", help="what /model and every answer call it; default: the file's stem")
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int8"),
        default="fp32",
        help="fp16 is for GPUs, int8 for CPUs with VNNI",
    )
    parser.add_argument(
        "--calibration", type=Path, help="int8: folder of a COCO-format data set, its train split is used"
    )
    parser.add_argument("--calibration-images", type=int, default=100, help="int8: pictures to take the ranges from")
    parser.add_argument(
        "--fp32-layers",
        choices=("none", "boxes", "outputs"),
        default="boxes",
        help="int8: the layers that stay fp32: none (costs much AP), the box layer, or class and box layers",
    )
    parser.add_argument(
        "--reduce-range",
        action="store_true",
        help="int8: weights of 7 bits, for CPUs without VNNI (no vnni in /proc/cpuinfo): there 8 bits can saturate, "
        "and less is won: measure speed and AP",
    )


def _add_article(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _command(
        commands, "article", "show the article's claims by small training runs, and write a page", article
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of a COCO-format data set")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the runs; repeated, the command goes on in it"
    )
    parser.add_argument("--page", type=Path, metavar="DIR", help="folder of ARTICLE.md and its plots; default: OUT")
    parser.add_argument("--rows", nargs="+", default=(), metavar="NAME", help="only these; default: all")
    parser.add_argument("--steps", type=int, metavar="N", help="at most so many for each row, to try the command")
    parser.add_argument("--workers", type=int, default=0, help="processes that load samples; 0: none")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    help_text: str,
    function: Callable[[argparse.Namespace], None],
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=help_text, description=help_text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(command=function)
    return parser


def demo(options: argparse.Namespace) -> None:
    from training.demo.draw import draw_data_set

    draw_data_set(options.out, images=options.images, validation_images=options.validation_images, seed=options.seed)


def anchors(options: argparse.Namespace) -> None:
    from training.report.anchor_fit import fit_anchors

    config = override(PRESETS[options.preset], vars(options))
    data_set = load_coco(options.data, options.split)
    print(fit_anchors(data_set, config.resize, config.model.level_anchors, config.loss).table())


def train(options: argparse.Namespace) -> None:
    from training.checkpoint import load_checkpoint
    from training.distributed import joined, local_device
    from training.evaluate import choose_device
    from training.exchange.finetune import fine_tuning_config, lineage
    from training.train import train as run_training

    config, init = override(PRESETS[options.preset], vars(options)), None
    notes = {
        "command": "python -m training " + shlex.join(sys.argv[1:]),
        "commit": current_commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if options.init is not None:
        init = load_checkpoint(options.init)
        notes["started_from"] = lineage(init)
        config = fine_tuning_config(init, PRESETS[options.preset], vars(options))
    device = local_device(choose_device(options.device))
    with joined(device) as ranks:
        if not ranks.is_first:
            logging.getLogger("training").setLevel(logging.WARNING)
        report = run_training(
            config,
            load_coco(options.data, "train", class_agnostic=config.class_agnostic),
            load_coco(options.data, "val", class_agnostic=config.class_agnostic),
            options.out,
            device=device,
            workers=options.workers,
            resume=options.resume,
            notes=notes,
            ranks=ranks,
            init=init,
        )
    if ranks.is_first:
        print(report.table())


def evaluate(options: argparse.Namespace) -> None:
    from training.distributed import joined, local_device
    from training.evaluate import choose_device, open_predictor
    from training.evaluate import evaluate as run_evaluation

    with joined(local_device(choose_device(options.device))) as ranks:
        report = run_evaluation(
            replace(open_predictor(options.model, options.device), scales=options.scales),
            load_coco(options.data, "val", class_agnostic=options.class_agnostic),
            limit=options.images,
            skip_unreadable=options.unreadable == "skip",
            ranks=ranks,
        )
    if ranks.is_first:
        print(report.table())


def import_weights(options: argparse.Namespace) -> None:
    from training.checkpoint import save_checkpoint
    from training.exchange.torchvision import import_weights as run_import

    checkpoint = run_import(options.arch, options.weights, label_file=options.labels, norm_epsilon=options.norm_eps)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(checkpoint, options.out)


def export(options: argparse.Namespace) -> None:
    from training.checkpoint import load_checkpoint
    from training.exchange.onnx_file import Calibration
    from training.exchange.onnx_file import export as run_export

    calibration = None
    if options.calibration is not None:
        data_set = load_coco(options.calibration, "train")
        calibration = Calibration(data_set, options.calibration_images, options.fp32_layers, options.reduce_range)
    run_export(
        load_checkpoint(options.model),
        options.out,
        name=options.name or options.out.stem,
        precision=options.precision,
        calibration=calibration,
    )


def article(options: argparse.Namespace) -> None:
    from training.ablations.page import write_page
    from training.ablations.runs import run_rows
    from training.evaluate import choose_device

    run_rows(
        options.data,
        options.out,
        names=options.rows,
        steps=options.steps,
        device=choose_device(options.device),
        workers=options.workers,
        commit=current_commit(),
    )
    write_page(options.out, options.page or options.out, load_coco(options.data, "val", class_agnostic=True))
    print((options.out / "log.md").read_text())


def current_commit() -> str:
    """The commit of the working tree, with a + where it has changes; empty outside a repository."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
