"""COCO-format data sets to be read, with whatever is to be odd about them."""

import json
from pathlib import Path
from typing import Any

from PIL import Image


def write_coco(folder: Path, *, split: str = "train", **changes: Any) -> Path:
    """Two pictures, two classes, an object and a crowd; `changes` replace whole lists."""
    content: dict[str, Any] = {
        "categories": [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}],
        "images": [
            {"id": 11, "file_name": "b.png", "height": 40, "width": 60},
            {"id": 5, "file_name": "a.png", "height": 30, "width": 20},
        ],
        "annotations": [
            {"id": 1, "image_id": 11, "category_id": 7, "bbox": [10, 5, 20, 30], "iscrowd": 0, "area": 600},
            {"id": 2, "image_id": 11, "category_id": 3, "bbox": [0, 0, 60, 40], "iscrowd": 1, "area": 2400},
        ],
    } | changes
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    images = folder / "images" / split
    images.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40), "red").save(images / "b.png")
    Image.new("RGB", (20, 30), "blue").save(images / "a.png")
    return folder
