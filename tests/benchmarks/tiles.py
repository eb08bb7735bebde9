"""The gain of tiles in AP, and their cost in time: the whole picture alone, and with tiles of several sizes.

    python -m tests.benchmarks.tiles [--data DIR] [--model FILE.onnx] [--images N] [--tiles 480 640 960]

Without --data, the pictures are 4 × 4 pictures of the demo data side by side, so that objects keep their size. Prints a
markdown table for docs/benchmarks.md; times are per picture, relative to the whole picture's.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from model.pretrained import PRETRAINED
from model.tiles import OVERLAP, Tiling, num_windows
from tests.benchmarks.measuring import machine, table
from tests.support.pictures import encode
from training.coco import CocoDataSet, load_coco
from training.demo.draw import LABELS, draw_picture
from training.evaluate import Predictor, evaluate, open_predictor

CELLS = 4
CELL = 640
"""Side of a cell, pixels: the demo's pictures are cut to it, with what they lose of their objects."""
LEAST_VISIBLE = 0.5
HEAD = ("windows beside the whole picture", "AP", "AP50", "small", "medium", "large", "time")


def draw_large(out: Path, images: int, seed: int) -> None:
    """Write a data set whose pictures are 4 × 4 of the demo's, side by side."""
    folder = out / "images" / "val"
    folder.mkdir(parents=True)
    pictures: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, images + 1):
        large = np.zeros((CELLS * CELL, CELLS * CELL, 3), np.uint8)
        for cell in range(CELLS**2):
            drawn = draw_picture(seed, "val", image_id * CELLS**2 + cell)
            top, left = (CELL * position for position in divmod(cell, CELLS))
            height, width = (min(side, CELL) for side in drawn.pixels.shape[:2])
            large[top : top + height, left : left + width] = drawn.pixels[:height, :width]
            for box, label in zip(drawn.boxes, drawn.labels, strict=True):
                inside = np.minimum(box, [width, height] * 2)
                if np.prod(inside[2:] - inside[:2]) < LEAST_VISIBLE * np.prod(box[2:] - box[:2]):
                    continue
                x, y = float(inside[0] + left), float(inside[1] + top)
                w, h = (inside[2:] - inside[:2]).tolist()
                annotations.append({
                    "id": len(annotations) + 1, "image_id": image_id, "category_id": int(label), "bbox": [x, y, w, h],
                    "area": w * h, "iscrowd": 0,
                })  # fmt: skip
        name = f"{image_id}.jpg"
        (folder / name).write_bytes(encode(large, "JPEG", quality=92))
        pictures.append({"id": image_id, "file_name": name, "height": large.shape[0], "width": large.shape[1]})
    categories = [{"id": number, "name": name} for number, name in enumerate(LABELS, start=1)]
    content = {"images": pictures, "annotations": annotations, "categories": categories}
    (out / "annotations").mkdir()
    (out / "annotations" / "instances_val.json").write_text(json.dumps(content))


def row(name: str, predictor: Predictor, data_set: CocoDataSet, limit: int) -> tuple[list[str], float]:
    """One line of the table, and the seconds of a picture."""
    started = time.perf_counter()
    report = evaluate(predictor, data_set, limit=limit, progress=False)
    seconds = (time.perf_counter() - started) / report.num_images
    by_size = [f"{value:.3f}" for value in (report.ap, report.ap50, report.ap_small, report.ap_medium, report.ap_large)]
    return [name, *by_size], seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a data set in COCO's format; its val split is used")
    parser.add_argument("--model", type=Path, default=PRETRAINED)
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--tiles", type=int, nargs="+", default=[480, 640, 960])
    parser.add_argument("--overlap", type=float, default=OVERLAP)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if given.data is None:
            draw_large(Path(folder), given.images, seed=7)
        data_set = load_coco(given.data or Path(folder), "val")
        predictor = open_predictor(given.model, "cpu")
        values, whole = row("none", predictor, data_set, given.images)
        rows = [[*values, "1"]]
        for size in given.tiles:
            tiling = Tiling(size, given.overlap)
            count = num_windows(*data_set.pictures[0].size, tiling)
            values, seconds = row(f"{count} of {size} px", replace(predictor, tiling=tiling), data_set, given.images)
            rows.append([*values, f"{seconds / whole:.1f} ×"])
        print(machine(), "", table(HEAD, rows), sep="\n")


if __name__ == "__main__":
    main()
