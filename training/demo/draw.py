"""Drawing of the demo data set: eight shapes on varied backgrounds, with COCO-format annotations.

A picture is a pure function of (seed, split, index): the same seed gives the same bytes for any number of workers, and
train and val share no random stream. Boxes are computed from the shapes' contours, clipped to the picture, not from
thresholded pixels. An object partly covered by another keeps its whole box. The shorter side of a picture is 480
pixels; a detector that enlarges it to 800 sees objects of 16 to 550 pixels.
"""

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from tqdm import tqdm

from model.types import Pixels
from training.demo import scenery, shapes
from training.demo.shapes import SHAPES, Shape

LABELS = tuple(SHAPES)
"""Labels in the order of category ids, from 1."""
SPLITS = ("train", "val")
DRAWING_VERSION = "1"
"""Version stored in every data set; it changes whenever the same seed gives other pictures."""

_SHORTER_SIDE = 480
_LONGER_SIDES = (480, 600, 640, 672, 720)
_SMALLEST, _TINY, _LARGEST = 9.6, 16.2, 330.0
_TINY_SHARE = 0.09
_MOST_OBJECTS = 14
_LEAST_INSIDE = 0.60
_LEAST_VISIBLE = 0.65
_JPEG_QUALITY = 92
_FILE_NAME = "{:06d}.jpg"


@dataclass(frozen=True, eq=False)
class DrawnPicture:
    pixels: Pixels
    boxes: NDArray[np.float64]
    """[objects, 4] xyxy, picture pixels."""
    labels: NDArray[np.int64]
    """[objects] category ids."""
    areas: NDArray[np.float64]
    """[objects] areas of the shapes inside the picture, with covered parts, square pixels."""


@dataclass(frozen=True, eq=False)
class PlacedObject:
    category_id: int
    shape: Shape
    """The whole shape, though the picture's border may cut it."""
    box: tuple[float, float, float, float]
    """Box of the part inside the picture, xyxy."""
    area: float
    """Area of the part inside the picture, with covered parts."""
    region: tuple[int, int, int, int]
    """The box, extended to whole pixels, xyxy."""
    coverage: NDArray[np.float32]
    """Coverage of each pixel of the region."""

    @property
    def size(self) -> float:
        xmin, ymin, xmax, ymax = self.box
        return max(xmax - xmin, ymax - ymin)


def draw_picture(seed: int, split: str, index: int) -> DrawnPicture:
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    height, width = _picture_size(rng)
    pixels = scenery.draw_background(rng, height, width)
    objects = place_objects(rng, height, width)
    for drawn in objects:
        _paint(rng, pixels, drawn)
    smallest = min((drawn.size for drawn in objects), default=_LARGEST)
    pixels = scenery.photograph(rng, pixels, most_blur=0.9 if smallest >= 2 * _TINY else 0.5)
    return DrawnPicture(
        pixels=pixels,
        boxes=np.array([drawn.box for drawn in objects], dtype=np.float64).reshape(-1, 4),
        labels=np.array([drawn.category_id for drawn in objects], dtype=np.int64),
        areas=np.array([drawn.area for drawn in objects], dtype=np.float64),
    )


def _picture_size(rng: np.random.Generator) -> tuple[int, int]:
    common = rng.random() < 0.8
    longer = int(rng.choice(_LONGER_SIDES) if common else rng.integers(_LONGER_SIDES[0], _LONGER_SIDES[-1] + 1))
    return (_SHORTER_SIDE, longer) if rng.random() < 0.6 else (longer, _SHORTER_SIDE)


def place_objects(rng: np.random.Generator, height: int, width: int) -> list[PlacedObject]:
    """Place objects, in drawing order. One may cover those before it if enough of each stays visible."""
    objects: list[PlacedObject] = []
    visible: list[NDArray[np.float32]] = []
    wanted = 0 if rng.random() < 0.05 else min(1 + rng.poisson(5.6), _MOST_OBJECTS)
    for _ in range(wanted):
        category_id, size = int(rng.integers(1, len(LABELS) + 1)), _random_size(rng)
        for _ in range(8):
            candidate = _random_object(rng, category_id, size, height, width)
            if candidate is None:
                continue
            still_visible = [_uncovered(*pair, candidate) for pair in zip(objects, visible, strict=True)]
            if all(map(_enough_visible, objects, still_visible)):
                objects.append(candidate)
                visible = [*still_visible, candidate.coverage]
                break
    return objects


def _random_size(rng: np.random.Generator) -> float:
    """Draw the longer side of an object's box, log-uniform, with a fixed share of tiny ones."""
    low, high = (_SMALLEST, _TINY) if rng.random() < _TINY_SHARE else (_TINY, _LARGEST)
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _random_object(
    rng: np.random.Generator, category_id: int, size: float, height: int, width: int
) -> PlacedObject | None:
    """Draw a random object; None: the picture's border would cut off too much."""
    margin = size / 2 if size < 2 * _TINY else size / 8
    shape = shapes.place(
        SHAPES[LABELS[category_id - 1]],
        size=size,
        aspect=math.exp(rng.uniform(math.log(0.75), math.log(4 / 3))),
        angle=rng.uniform(0, 2 * math.pi),
        centre=(rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)),
    )
    clipped = shapes.clip(shape, width, height)
    if not clipped or shapes.area(clipped) < _LEAST_INSIDE * shapes.area(shape):
        return None
    xmin, ymin, xmax, ymax = shapes.box(clipped)
    region = (math.floor(xmin), math.floor(ymin), math.ceil(xmax), math.ceil(ymax))
    return PlacedObject(
        category_id=category_id,
        shape=shape,
        box=(xmin, ymin, xmax, ymax),
        area=shapes.area(clipped),
        region=region,
        coverage=shapes.coverage(shape, region),
    )


def _uncovered(earlier: PlacedObject, visible: NDArray[np.float32], later: PlacedObject) -> NDArray[np.float32]:
    """Compute the part of the earlier object's `visible` coverage that the later one does not cover."""
    (ax, ay, _, _), (bx, by, _, _) = earlier.region, later.region
    xmin, ymin = max(ax, bx), max(ay, by)
    xmax, ymax = min(earlier.region[2], later.region[2]), min(earlier.region[3], later.region[3])
    if xmin >= xmax or ymin >= ymax:
        return visible
    left = visible.copy()
    covered = later.coverage[ymin - by : ymax - by, xmin - bx : xmax - bx]
    left[ymin - ay : ymax - ay, xmin - ax : xmax - ax] *= 1 - covered
    return left


def _enough_visible(drawn: PlacedObject, visible: NDArray[np.float32]) -> bool:
    return float(visible.sum()) >= _LEAST_VISIBLE * float(drawn.coverage.sum())


def _paint(rng: np.random.Generator, pixels: Pixels, drawn: PlacedObject) -> None:
    xmin, ymin, xmax, ymax = drawn.region
    least_distance = 54 if drawn.size < 30 else 42
    colour = _contrasting_colour(rng, _surroundings(pixels, drawn.region), least_distance)
    paint = _fill(rng, colour, ymax - ymin, xmax - xmin, textured=drawn.size >= 24)
    if rng.random() < 0.25 and drawn.size >= 40:
        thickness = round(rng.uniform(0.03, 0.08) * drawn.size)
        outline = shapes.stroke(drawn.shape, drawn.region, thickness)[:, :, None]
        paint = paint + outline * (colour * np.float32(rng.choice([0.45, 0.6, 1.4])) - paint)
    ground = pixels[ymin:ymax, xmin:xmax]
    ground[:] = ground + drawn.coverage[:, :, None] * (np.clip(paint, 0, 255) - ground) + np.float32(0.5)


def _fill(
    rng: np.random.Generator, colour: NDArray[np.float32], height: int, width: int, textured: bool
) -> NDArray[np.float32]:
    """Make an object's colours, plain or with a faint pattern; small objects (not `textured`) stay plain or graded."""
    kind = rng.choice(["plain", "ramp", "stripes", "noise"], p=[0.4, 0.25, 0.2, 0.15])
    if kind == "ramp":
        return colour + scenery.ramp(rng, height, width)[:, :, None] * np.float32(rng.uniform(8, 30))
    if kind == "stripes" and textured:
        stripes = scenery.stripes(rng, height, width, rng.uniform(5, 24))
        return colour + stripes[:, :, None] * np.float32(rng.uniform(4, 14))
    if kind == "noise" and textured:
        return colour + scenery.smooth_noise(rng, height, width, rng.uniform(4, 24)) * np.float32(rng.uniform(5, 25))
    return np.broadcast_to(colour, (height, width, 3))


def _surroundings(pixels: Pixels, region: tuple[int, int, int, int]) -> Pixels:
    """Take 8 x 8 samples of the region and its neighbourhood."""
    xmin, ymin, xmax, ymax = region
    margin = 2 + max(xmax - xmin, ymax - ymin) // 8
    height, width, _ = pixels.shape
    rows = np.linspace(max(ymin - margin, 0), min(ymax + margin, height) - 1, 8).astype(int)
    columns = np.linspace(max(xmin - margin, 0), min(xmax + margin, width) - 1, 8).astype(int)
    return np.asarray(pixels[np.ix_(rows, columns)])


def _contrasting_colour(rng: np.random.Generator, surroundings: Pixels, least_distance: float) -> NDArray[np.float32]:
    """Draw an RGB colour, 0 to 255, at this CIELAB distance from nearly all surroundings, or the farthest one tried."""
    colours = scenery.random_colours(rng, 16, saturation=1.0, value=0.15)
    lab = cv2.cvtColor(colours[None] / 255, cv2.COLOR_RGB2LAB)[0]
    around = cv2.cvtColor(surroundings.astype(np.float32) / 255, cv2.COLOR_RGB2LAB).reshape(-1, 3)
    distances = np.sort(np.linalg.norm(lab[:, None] - around, axis=2), axis=1)
    nearest = distances[:, distances.shape[1] // 10]
    enough = np.flatnonzero(nearest >= least_distance)
    return np.asarray(colours[enough[0] if len(enough) else np.argmax(nearest)])


def draw_data_set(out: Path, *, images: int, validation_images: int, seed: int, workers: int | None = None) -> None:
    """Draw `images` and `validation_images` pictures into out/images/{train,val}, then write out/annotations.

    The annotations appear last and at once, so a folder that has them is complete. ValueError: it has them already.
    `workers` processes draw; None: one for each available core.
    """
    annotations = out / "annotations"
    if annotations.exists():
        raise ValueError(f"{annotations} exists already: choose another folder, or remove it to draw the data set anew")
    if min(images, validation_images, seed) < 0:
        raise ValueError(f"negative: images {images}, validation images {validation_images}, seed {seed}")
    unfinished = out / "annotations.unfinished"
    unfinished.mkdir(parents=True, exist_ok=True)
    with _parallel_map(workers or len(os.sched_getaffinity(0))) as parallel_map:
        for split, count in zip(SPLITS, (images, validation_images), strict=True):
            folder = out / "images" / split
            folder.mkdir(parents=True, exist_ok=True)
            drawn = parallel_map(partial(_draw_file, folder, seed, split), range(count))
            pictures = list(tqdm(drawn, total=count, desc=split, unit="picture"))
            (unfinished / f"instances_{split}.json").write_text(json.dumps(_coco(pictures, seed, split)))
    unfinished.rename(annotations)


@contextmanager
def _parallel_map(workers: int) -> Iterator[Callable[..., Iterable["_Annotated"]]]:
    """Map in this process, or in order by a pool of processes. They are spawned: a fork would copy held locks."""
    if workers == 1:
        yield map
        return
    with multiprocessing.get_context("spawn").Pool(workers, cv2.setNumThreads, (1,)) as pool:
        yield partial(pool.imap, chunksize=16)


@dataclass(frozen=True, eq=False)
class _Annotated:
    """The annotations of one picture."""

    size: tuple[int, int]
    """Size (height, width), pixels."""
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]


def _draw_file(folder: Path, seed: int, split: str, index: int) -> _Annotated:
    drawn = draw_picture(seed, split, index)
    jpeg = simplejpeg.encode_jpeg(drawn.pixels, quality=_JPEG_QUALITY, colorspace="RGB", colorsubsampling="444")
    (folder / _FILE_NAME.format(index + 1)).write_bytes(jpeg)
    height, width, _ = drawn.pixels.shape
    return _Annotated((height, width), drawn.boxes, drawn.labels, drawn.areas)


def _coco(pictures: list[_Annotated], seed: int, split: str) -> dict[str, Any]:
    objects = [
        (image_id, box, label, area)
        for image_id, picture in enumerate(pictures, start=1)
        for box, label, area in zip(picture.boxes, picture.labels, picture.areas, strict=True)
    ]
    return {
        "info": {"description": f"Drawn shapes, {split}", "version": DRAWING_VERSION, "seed": seed},
        "licenses": [],
        "images": [
            {"id": image_id, "file_name": _FILE_NAME.format(image_id), "height": size[0], "width": size[1]}
            for image_id, size in enumerate((picture.size for picture in pictures), start=1)
        ],
        "annotations": [
            {
                "id": annotation_id,
                "image_id": image_id,
                "category_id": int(label),
                "bbox": [round(float(side), 2) for side in (box[0], box[1], box[2] - box[0], box[3] - box[1])],
                "area": round(float(area), 2),
                "iscrowd": 0,
            }
            for annotation_id, (image_id, box, label, area) in enumerate(objects, start=1)
        ],
        "categories": [
            {"id": category_id, "name": label, "supercategory": "shape"}
            for category_id, label in enumerate(LABELS, start=1)
        ],
    }
