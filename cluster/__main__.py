"""`python -m cluster detect` detects in any number of pictures, on any number of machines; `coco` makes COCO results.

Exit codes: 0, 1 if some pictures could not be read (their rows say why), 2 if the job cannot start or continue. Written
rows stay, and the same command continues from them.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from model.detector import DeviceUnavailable
from model.metadata import InvalidModel
from model.tiles import MAX_OVERLAP, MAX_TILE, MIN_TILE, OVERLAP, Tiling
from service.config import OneLineParser, add_setting_flags, read_settings
from service.detect import SETTINGS

WRITE_EVERY_SECONDS = 60.0
STOPPED = "the job stopped, and continues when it is started again"


class Parser(OneLineParser):
    program = "python -m cluster"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        from ray.data.exceptions import ExecutionTimeoutError
        from ray.exceptions import RayError
    except ImportError as error:
        parser.error(f"{error}: this needs the extra [ray], pip install '.[ray]'")
    try:
        return _coco(given) if given.command == "coco" else _detect(parser, given)
    except ExecutionTimeoutError as error:
        parser.error(f"{STOPPED}: {str(error).splitlines()[0]}")
    except RayError as error:  # the text is the worker's whole traceback
        parser.error(f"{STOPPED}: {str(error).strip().splitlines()[-1].strip()}")
    except (InvalidModel, DeviceUnavailable, OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))


def _parser() -> Parser:
    parser = Parser(
        prog=Parser.program, description="Detect in any number of pictures by Ray Data. Defaults are in []."
    )
    commands = parser.add_subparsers(required=True, dest="command", metavar="detect|coco")
    detect = commands.add_parser("detect", allow_abbrev=False, help="detect in all pictures that have no row yet")
    detect.add_argument("source", metavar="SOURCE", help="a folder or file; s3://BUCKET/PREFIX, gs://BUCKET/PREFIX")
    detect.add_argument("--out", required=True, metavar="DEST", help="the folder of Parquet files, or its URI")
    detect.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS"),
        help="the Ray cluster to use [RAY_ADDRESS, else this machine alone]",
    )
    detect.add_argument("--workers", type=_count, metavar="N", help="detectors at once [one for each CPU or GPU]")
    detect.add_argument(
        "--write-every-seconds",
        type=float,
        default=WRITE_EVERY_SECONDS,
        metavar="SECONDS",
        help=f"time between two writes, the most that a kill can lose [{WRITE_EVERY_SECONDS:g}]",
    )
    detect.add_argument(
        "--tile",
        type=int,
        metavar="PX",
        help=f"detect in windows of this side too, pixels, {MIN_TILE} to {MAX_TILE} [none]",
    )
    detect.add_argument(
        "--overlap",
        type=float,
        metavar="X",
        help=f"share of a window that its neighbour has too, 0 to {MAX_OVERLAP} [{OVERLAP}]",
    )
    add_setting_flags(detect, [name for name in SETTINGS if name != "threads"])
    detect.add_argument("--threads", default=argparse.SUPPRESS, help="CPU threads of one detector [1]")
    coco = commands.add_parser("coco", allow_abbrev=False, help="write the rows as COCO results JSON")
    coco.add_argument("dest", metavar="DEST", help="the folder or URI that `detect` wrote")
    coco.add_argument("--out", required=True, type=Path, metavar="FILE", help="write the COCO results JSON here")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def _detect(parser: Parser, given: argparse.Namespace) -> int:
    from cluster.batch import detect
    from cluster.pictures import Pictures
    from cluster.results import Results

    settings, tiling = read_settings(parser, given), Tiling.asked_for(given.tile, given.overlap)
    failed = detect(
        Pictures.at(given.source),
        Results.at(given.out),
        settings,
        tiling,
        address=given.address,
        workers=given.workers,
        write_every_seconds=given.write_every_seconds,
    )
    if failed:
        sys.stderr.write(f"{failed} pictures could not be read\n")
    return 1 if failed else 0


def _coco(given: argparse.Namespace) -> int:
    from cluster.results import Results

    if failed := Results.at(given.dest).write_coco(given.out):
        sys.stderr.write(f"{failed} pictures could not be read, and have no results\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
