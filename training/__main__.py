"""`python -m training`: demo | anchors | train | average | evaluate | import | export | ablations.

Errors that a user can fix print one line on stderr and exit with code 2. A training that SIGTERM ends writes its
checkpoint and exits with 143.
"""

import argparse
import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from model.metadata import InvalidModel
from model.tiles import Tiling
from training.arguments import build_parser
from training.checkpoint import InvalidCheckpoint
from training.coco import InvalidDataSet, load_coco
from training.config import with_flags
from training.presets import PRESETS
from training.stopping import EXIT_CODE, Terminated

USER_ERRORS = (InvalidCheckpoint, InvalidDataSet, InvalidModel, ValueError, OSError, RuntimeError)


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(format="%(levelname)s %(message)s")
    logging.getLogger("training").setLevel(logging.INFO)
    options = build_parser().parse_args(arguments)
    try:
        COMMANDS[options.command](options)
    except Terminated as stopped:
        print(f"python -m training: {stopped}", file=sys.stderr)
        return EXIT_CODE
    except USER_ERRORS as error:
        text = " ".join(str(error).split())  # torch's messages have many lines
        print(f"python -m training: error: {text}", file=sys.stderr)
        return 2
    return 0


def demo(options: argparse.Namespace) -> None:
    from training.demo.draw import draw_data_set

    draw_data_set(options.out, images=options.images, validation_images=options.validation_images, seed=options.seed)


def anchors(options: argparse.Namespace) -> None:
    from training.report.anchor_fit import fit_anchors

    config = with_flags(PRESETS[options.preset], vars(options))
    data_set = load_coco(options.data, options.split)
    print(fit_anchors(data_set, config.resize, config.model.level_anchors, config.loss).table())


def train(options: argparse.Namespace) -> None:
    from training.checkpoint import load_checkpoint
    from training.distributed import joined, loading_processes, local_device
    from training.evaluate import choose_device
    from training.exchange.finetune import fine_tuning_config, lineage
    from training.train import train as run_training

    config, init = with_flags(PRESETS[options.preset], vars(options)), None
    notes = provenance()
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
            workers=loading_processes() if options.workers is None else options.workers,
            resume=options.resume,
            notes=notes,
            ranks=ranks,
            init=init,
        )
    if ranks.is_first:
        print(report.table())


def average(options: argparse.Namespace) -> None:
    from training.checkpoint import load_checkpoint, save_checkpoint
    from training.exchange.average import average as run_average
    from training.exchange.average import with_ap

    checkpoint = run_average([load_checkpoint(file) for file in options.models], provenance())
    data_set = load_coco(options.data, "val", class_agnostic=checkpoint.config.class_agnostic)
    checkpoint = with_ap(checkpoint, data_set, options.device)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(checkpoint, options.out)
    print("AP unknown: no objects" if checkpoint.ap is None else f"AP {checkpoint.ap:.4f}")


def evaluate(options: argparse.Namespace) -> None:
    from training.annotations.pictures import refuse_absent
    from training.distributed import joined, local_device
    from training.evaluate import choose_device, open_predictor
    from training.evaluate import evaluate as run_evaluation

    data_set, skip = load_coco(options.data, "val", class_agnostic=options.class_agnostic), options.unreadable == "skip"
    refuse_absent(data_set, skip=skip)

    tiling = Tiling.asked_for(options.tile, options.overlap)
    if tiling is not None and options.scales:
        raise ValueError("--tile and --scales are two ways to look at a picture more than once: take one")
    with joined(local_device(choose_device(options.device))) as ranks:
        report = run_evaluation(
            replace(open_predictor(options.model, options.device), scales=options.scales, tiling=tiling),
            data_set,
            limit=options.images,
            skip_unreadable=skip,
            ranks=ranks,
        )
    if ranks.is_first:
        print(report.table())


def import_weights(options: argparse.Namespace) -> None:
    from training.checkpoint import save_checkpoint
    from training.exchange.torchvision import import_weights as run_import

    checkpoint = run_import(
        options.arch,
        options.weights,
        label_file=options.labels,
        norm_epsilon=options.norm_eps,
        flags=vars(options),
    )
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
        made_for=options.made_for,
    )


def ablations(options: argparse.Namespace) -> None:
    from training.ablations.page import write_page
    from training.ablations.runs import run_ablations

    run_ablations(
        options.data,
        options.out,
        names=options.only,
        steps=options.steps,
        device=options.device,
        workers=options.workers,
        commit=current_commit(),
    )
    write_page(options.out, options.page or options.out, load_coco(options.data, "val", class_agnostic=True))
    print((options.out / "log.md").read_text())


def provenance() -> dict[str, str]:
    """Return how the weights that this process makes are made, for their readers."""
    return {
        "command": "python -m training " + shlex.join(sys.argv[1:]),
        "commit": current_commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def current_commit() -> str:
    """Return the commit of the working tree, with a + if it has changes; empty outside a repository."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip()


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "demo": demo,
    "anchors": anchors,
    "train": train,
    "average": average,
    "evaluate": evaluate,
    "import": import_weights,
    "export": export,
    "ablations": ablations,
}

if __name__ == "__main__":
    sys.exit(main())
