"""`python -m service detect`: detect in files, in process, by the same code that serves.

In: image files, and folders, which are searched for files whose name or first bytes are an image's. Out: COCO results
JSON (boxes xywh in pixels of the upright picture; `image_id` is the file's stem if that is an integer, else its name),
and the pictures with the boxes drawn. Files are written under a temporary name and renamed; none of them replaces a
file that is read. A file that cannot be read or drawn does not affect the others.

Exit codes: 0, 1 if some files could not be read or drawn, 2 if nothing could be done.
"""

import argparse
import collections
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from model.detector import Detector, DeviceUnavailable, InferenceFailed
from model.files import write_whole
from model.formats.signatures import HEAD_BYTES, READ, SUFFIXES, name_of
from model.image import InvalidImage, decode_image
from model.metadata import InvalidModel
from model.tiles import MAX_OVERLAP, MAX_TILE, MIN_TILE, OVERLAP, Tiling
from model.types import Detections, Pixels, coco_results
from service.config import PROGRAM, OneLineParser, Settings, add_setting_flags, read_settings
from service.drawing import SideTooLong, draw, encode_picture
from service.label_studio import LOCAL_FILES, LabelConfig, Tasks, read_label_config
from service.logs import printable
from service.outputs import check_outputs

JPEG_SUFFIXES = (".jpg", ".jpeg")
MAX_BYTES_PER_PIXEL = 8
"""16 bits of red, green, blue and alpha; no format needs more."""
MAX_OTHER_BYTES = 64 * 2**20
"""Bytes of a file besides its pixels."""
FORESEEN = (InvalidImage, InferenceFailed, SideTooLong, OSError)
"""Reasons why a file cannot be read or drawn; anything else is a bug, and its kind is named."""
SETTINGS = (
    "model", "device", "threads", "gpu_memory_limit_bytes", "score_threshold", "nms_threshold", "max_detections",
    "max_image_pixels",
)  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    settings = read_settings(parser, given)
    try:
        config = _label_config(given)
        tiling = Tiling.asked_for(given.tile, given.overlap)
        files, left_out = find_images(given.images)
        drawings = [] if given.draw is None else [drawing_of(given.draw / name) for _, name in files]
        results_files = [path for path in (given.out, given.label_studio) if path is not None]
        check_outputs([*(path for path, _ in files), settings.model_file], [*drawings, *results_files])
        for path in results_files:
            path.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written shall be told before the work
        detector = Detector(
            settings.model_file,
            device=settings.device,
            threads=settings.threads,
            gpu_memory_limit_bytes=settings.gpu_memory_limit_bytes,
        )
        tasks = None if config is None else Tasks(detector, config, given.image_url or LOCAL_FILES)
        results, failed = detect_files(detector, files, settings, drawings, tiling, tasks)
        if tasks is None or given.out is not None:
            _write_results(results, given.out)
        if tasks is not None:
            _write(given.label_studio, tasks.json().encode())
    except (InvalidModel, DeviceUnavailable, OSError, ValueError) as error:
        parser.error(str(error))
    if left_out:
        sys.stderr.write(printable(f"{left_out.total()} files were left out: {_counts(left_out)}") + "\n")
    if tasks is not None and tasks.skipped:
        sys.stderr.write(printable(f"the label configuration has no label for {_counts(tasks.skipped)}") + "\n")
    if failed:
        sys.stderr.write(f"{len(failed)} of {len(files)} files could not be read or drawn\n")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=f"{PROGRAM} detect",
        allow_abbrev=False,
        description="Detect objects in files. Defaults are in [].",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE|FOLDER", help="files, or folders of files")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the COCO results JSON here [standard output]")
    parser.add_argument("--draw", type=Path, metavar="DIR", help="write the pictures with the boxes drawn here [none]")
    parser.add_argument(
        "--tile",
        type=int,
        metavar="PX",
        help=f"detect in windows of this side too, pixels, {MIN_TILE} to {MAX_TILE} [none]",
    )
    parser.add_argument(
        "--overlap",
        type=float,
        metavar="X",
        help=f"share of a window that its neighbour has too, 0 to {MAX_OVERLAP} [{OVERLAP}]",
    )
    parser.add_argument(
        "--label-studio",
        type=Path,
        metavar="FILE",
        help="write tasks with boxes for Label Studio here [none]",
    )
    parser.add_argument(
        "--label-config",
        type=Path,
        metavar="FILE",
        help="the Label Studio project's configuration, XML [the names label and image, every label]",
    )
    parser.add_argument(
        "--image-url", metavar="URL", help=f"beginning of a picture's address in the tasks [{LOCAL_FILES}]"
    )
    add_setting_flags(parser, SETTINGS)
    return parser


def _label_config(given: argparse.Namespace) -> LabelConfig | None:
    """Read the label configuration; None: no tasks are wanted. ValueError: it is invalid, or given without tasks."""
    if given.label_studio is None:
        if given.label_config is not None or given.image_url is not None:
            raise ValueError("--label-config and --image-url go with --label-studio")
        return None
    return LabelConfig() if given.label_config is None else read_label_config(given.label_config)


def find_images(paths: Sequence[Path]) -> tuple[list[tuple[Path, Path]], collections.Counter[str]]:
    """Return (file, name relative to the given folder) of each image, in order of name, with all subfolders; and the
    number of other files by kind.

    ValueError: a path does not exist, or a folder has no image.
    """
    images: list[tuple[Path, Path]] = []
    left_out: collections.Counter[str] = collections.Counter()
    for path in paths:
        if path.is_dir():
            before = len(images)
            for file in sorted(each for each in path.rglob("*") if each.is_file()):
                if (kind := other_kind(file)) is None:
                    images.append((file, file.relative_to(path)))
                else:
                    left_out[kind] += 1
            if len(images) == before:
                raise ValueError(f"{path} has no images ({', '.join(READ)}){_but(left_out)}")
        elif path.exists():
            images.append((path, Path(path.name)))
        else:
            raise ValueError(f"{path} does not exist")
    return images, left_out


def other_kind(file: Path) -> str | None:
    """Name the kind of a file whose name and first bytes are not an image's; None: it is an image."""
    if file.suffix.lower() in SUFFIXES:
        return None
    try:
        with file.open("rb") as opened:
            name = name_of(opened.read(HEAD_BYTES))
    except OSError:
        name = None
    return None if name in READ else name or file.suffix.lower() or "no ending"


def _counts(kinds: collections.Counter[str]) -> str:
    return ", ".join(f"{count} × {kind}" for kind, count in kinds.most_common())


def _but(kinds: collections.Counter[str]) -> str:
    return f", but {_counts(kinds)}" if kinds else ""


def detect_files(
    detector: Detector, files: Sequence[tuple[Path, Path]], settings: Settings, drawings: Sequence[Path] = (),
    tiling: Tiling | None = None, tasks: Tasks | None = None,
) -> tuple[list[dict[str, Any]], list[Path]]:  # fmt: skip
    """Return the COCO results of all files, and the files that could not be read or drawn.

    `drawings` has the path of each file's drawing, or is empty. `tasks` gets each file that was read. ValueError: two
    files have one image_id.
    """
    results: list[dict[str, Any]] = []
    failed: list[Path] = []
    owners: dict[int | str, Path] = {}
    for path, _ in files:
        if (owner := owners.setdefault(image_id_of(path), path)) != path:
            raise ValueError(f"{owner} and {path} would have the same image_id {image_id_of(path)!r}")
    with tqdm(files, unit="image", disable=None) as progress:
        for number, (path, name) in enumerate(progress):
            try:
                pixels = decode_image(read_image(path, settings), max_pixels=settings.max_image_pixels)
                detections = detector.detect(
                    pixels,
                    score_threshold=settings.score_threshold,
                    nms_threshold=settings.nms_threshold,
                    max_detections=settings.max_detections,
                    tiling=tiling,
                )
                results += coco_results(image_id_of(path), detections)
                if tasks is not None:
                    tasks.add(name, pixels.shape[:2], detections)
                if drawings:
                    _write_drawing(drawings[number], pixels, detections, detector)
            except Exception as error:  # the boundary of one file: whatever it is, the others' results are kept
                reason = str(error) if isinstance(error, FORESEEN) else repr(error)
                progress.write(printable(f"{path}: {reason}"), file=sys.stderr)
                failed.append(path)
    return results, failed


def read_image(path: Path, settings: Settings) -> bytes:
    """Return the file's bytes. InvalidImage: it is no regular file, or larger than a picture of the allowed pixels."""
    if not path.is_file():
        raise InvalidImage("it is no regular file")
    with path.open("rb") as file:
        data = file.read(max_file_bytes(settings) + 1)
    refuse_giant(len(data), settings)
    return data


def max_file_bytes(settings: Settings) -> int:
    """Return the most bytes that a picture of the allowed pixels has."""
    return settings.max_image_pixels * MAX_BYTES_PER_PIXEL + MAX_OTHER_BYTES


def refuse_giant(num_bytes: int, settings: Settings) -> None:
    """Raise InvalidImage if a file of so many bytes is larger than a picture of the allowed pixels."""
    if num_bytes > (most := max_file_bytes(settings)):
        raise InvalidImage(f"it has more than {most} bytes, which no picture needs that is allowed")


def image_id_of(path: Path) -> int | str:
    return int(path.stem) if path.stem.isdecimal() else path.name


def drawing_of(path: Path) -> Path:
    """Return the path of a picture's drawing: a JPEG keeps its name, others get .png added."""
    return path if path.suffix.lower() in JPEG_SUFFIXES else path.with_name(path.name + ".png")


def _write_drawing(path: Path, pixels: Pixels, detections: Detections, detector: Detector) -> None:
    names = {label.class_id: label.label for label in detector.metadata.labels}
    picture = draw(pixels, detections, names)
    _write(path, encode_picture(picture, "jpeg" if path.suffix.lower() in JPEG_SUFFIXES else "png"))


def _write_results(results: list[dict[str, Any]], path: Path | None) -> None:
    text = json.dumps([rounded(result) for result in results]) + "\n"
    if path is None:
        sys.stdout.write(text)
    else:
        _write(path, text.encode())


def rounded(result: dict[str, Any]) -> dict[str, Any]:
    """Round for a readable file: boxes to a thousandth of a pixel, scores to six digits."""
    return result | {"bbox": [round(side, 3) for side in result["bbox"]], "score": round(result["score"], 6)}


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data)
