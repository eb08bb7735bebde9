"""The command lines of `python -m training`: the flags of each command."""

import argparse
from pathlib import Path
from typing import TypeAlias, get_args

from model.detector import Device
from model.metadata import AnchorConfig, ResizePolicy
from model.tiles import MAX_TILE, MIN_TILE, OVERLAP
from training.config import TrainConfig, add_flags
from training.presets import PRESETS

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="demo | anchors | train | average | evaluate | import | export | ablations",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_demo, _add_anchors, _add_train, _add_average, _add_evaluate, _add_import, _add_export, _add_ablations,
    ):  # fmt: skip
        add(commands)
    return parser


def _add_demo(commands: Commands) -> None:
    parser = _command(commands, "demo", "draw a data set of shapes in COCO format")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must hold no data set yet")
    parser.add_argument("--images", type=int, default=6000, help="training pictures")
    parser.add_argument("--validation-images", type=int, default=500, help="validation pictures")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes")


def _add_anchors(commands: Commands) -> None:
    parser = _command(commands, "anchors", "say whether a recipe's anchors fit a data set, and suggest better ones")
    _add_data(parser)
    parser.add_argument("--split", choices=("train", "val"), default="train", help="split whose objects count")
    _add_recipe(parser)


def _add_train(commands: Commands) -> None:
    parser = _command(commands, "train", "train RetinaNet on COCO-format data")
    _add_data(parser)
    parser.add_argument("--out", type=Path, required=True, help="run folder: last.pt, best.pt, metrics.jsonl, report/")
    parser.add_argument(
        "--init",
        type=Path,
        metavar="CHECKPOINT.pt",
        help="start from this checkpoint's weights and architecture, with the data set's classes; `import` makes a "
        "checkpoint of COCO weights",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="loading processes for each training process; 0: none; default: its share of the cores, at most 16",
    )
    _add_device(parser)
    parser.add_argument("--resume", action="store_true", help="continue from last.pt if there is one")
    _add_recipe(parser)


def _add_average(commands: Commands) -> None:
    parser = _command(commands, "average", "make a checkpoint of the mean weights of fine-tunings of one model")
    parser.add_argument("models", type=Path, nargs="+", metavar="CHECKPOINT.pt", help="two or more")
    _add_data(parser, "; its val split gives the mean's AP")
    parser.add_argument("--out", type=Path, required=True, help="CHECKPOINT.pt")
    _add_device(parser)


def _add_evaluate(commands: Commands) -> None:
    parser = _command(commands, "evaluate", "print the COCO AP of a checkpoint or an ONNX file")
    _add_data(parser, "; its val split is used")
    parser.add_argument("--model", type=Path, required=True, help="CHECKPOINT.pt or FILE.onnx")
    parser.add_argument("--images", type=int, default=0, help="only the first N pictures; 0: all")
    parser.add_argument(
        "--unreadable",
        choices=("stop", "skip"),
        default="stop",
        help="stop at a picture that cannot be read, or skip it",
    )
    parser.add_argument(
        "--scales",
        type=_sides,
        default=(),
        metavar="PX,PX,...",
        help="shorter sides of an image pyramid, such as 600,800,1000; default: the model's own size alone",
    )
    parser.add_argument(
        "--tile", type=int, metavar="PX", help=f"detect in windows of this side too, pixels, {MIN_TILE} to {MAX_TILE}"
    )
    parser.add_argument(
        "--overlap", type=float, metavar="X", help=f"share of a window that its neighbour has too; default: {OVERLAP}"
    )
    parser.add_argument("--class-agnostic", action="store_true", help="ignore classes, as for proposals")
    _add_device(parser)


def _sides(text: str) -> tuple[int, ...]:
    sides = text.split(",")
    if not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of sides above 0, such as 600,800,1000")
    return tuple(int(side) for side in sides)


def _add_import(commands: Commands) -> None:
    parser = _command(commands, "import", "make a checkpoint of torchvision's RetinaNet weights")
    parser.add_argument(
        "--arch",
        choices=("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"),
        required=True,
        help="torchvision's architecture",
    )
    parser.add_argument(
        "--weights",
        required=True,
        metavar="coco|FILE.pth",
        help="coco: torchvision's own weights, downloaded to its cache; or a file with a state dict, by torch.save, in "
        "a training checkpoint, or in safetensors",
    )
    parser.add_argument("--out", type=Path, required=True, help="CHECKPOINT.pt")
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="names of the class columns: COCO's JSON (a column is a category id), or text with one line for each "
        "column, from column 0; needed if the weights are not for COCO's 91",
    )
    parser.add_argument(
        "--norm-eps",
        type=float,
        metavar="X",
        help="epsilon of the backbone's batch norm; default: 0 for torchvision's v1 COCO weights, else 1e-5",
    )
    group = parser.add_argument_group("values that differ from torchvision's")
    for values in (AnchorConfig, ResizePolicy):
        add_flags(group, values)  # type: ignore[arg-type]


def _add_export(commands: Commands) -> None:
    parser = _command(commands, "export", "write the ONNX file that the service loads")
    parser.add_argument("--model", type=Path, required=True, help="CHECKPOINT.pt")
    parser.add_argument("--out", type=Path, required=True, help="FILE.onnx")
    parser.add_argument("--name", help="the model's name in /model and answers; default: the file's stem")
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int8"),
        default="fp32",
        help="fp16 is for GPUs, int8 for CPUs with VNNI",
    )
    parser.add_argument(
        "--for",
        choices=("any", "cpu"),
        default="any",
        dest="made_for",
        help="cpu: fp32 with the 3x3 convolutions of 256 and more channels by Winograd's algorithm; slow on a GPU",
    )
    parser.add_argument(
        "--calibration", type=Path, help="int8: folder of a COCO-format data set, whose train split is used"
    )
    parser.add_argument("--calibration-images", type=int, default=100, help="int8: pictures that give the ranges")
    parser.add_argument(
        "--fp32-layers",
        choices=("none", "boxes", "outputs"),
        default="boxes",
        help="int8: the layers that stay fp32: none (costs much AP), the box layer, or class and box layers",
    )
    parser.add_argument(
        "--reduce-range",
        action="store_true",
        help="int8: weights of 7 bits, for CPUs without VNNI (no vnni in /proc/cpuinfo), where 8 bits can saturate; "
        "measure speed and AP",
    )


def _add_ablations(commands: Commands) -> None:
    parser = _command(
        commands,
        "ablations",
        "check the claims of the article 'The intuition behind RetinaNet' by small training runs, and write a page",
        alias="article",
    )
    _add_data(parser)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the runs; the repeated command continues in it"
    )
    parser.add_argument("--page", type=Path, metavar="DIR", help="folder of ablations.md and its plots; default: OUT")
    parser.add_argument("--only", "--rows", nargs="+", default=(), metavar="NAME", help="only these; default: all")
    parser.add_argument("--steps", type=int, metavar="N", help="most steps of each run, to try the command")
    parser.add_argument("--workers", type=int, default=0, help="loading processes; 0: none")
    _add_device(parser)


def _command(commands: Commands, name: str, help_text: str, *, alias: str = "") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        aliases=[alias] if alias else [],
        help=help_text,
        description=help_text,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(command=name)
    return parser


def _add_data(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument("--data", type=Path, required=True, help=f"folder of a COCO-format data set{more}")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=get_args(Device), default="auto", help="device that computes")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="recipe; every value has a flag of its own")
    add_flags(parser.add_argument_group("values of the preset"), TrainConfig)  # type: ignore[arg-type]
