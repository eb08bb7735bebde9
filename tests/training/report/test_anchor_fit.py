"""The anchor fit against every anchor of the grid, and its suggestions against data whose answer is known."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from model.anchors import AnchorConfig, Anchors
from model.image import resized_size
from model.metadata import Label, ResizePolicy
from tests.support.tiny_training import write_tiny_data
from training.__main__ import main
from training.annotations.boxes import BoxCounts, Truth
from training.coco import CocoDataSet, Picture
from training.config import LossConfig
from training.report.anchor_fit import best_anchors, canvas_objects, fit_anchors, typical_ratios

RESIZE = ResizePolicy(shorter_side=256, longest_side=400)


def data_set(boxes: Sequence[np.ndarray], size: tuple[int, int] = (300, 500)) -> CocoDataSet:  # type: ignore[type-arg]
    """A picture for each array of boxes."""
    pictures = [
        Picture(
            index,
            Path(f"{index}.jpg"),
            size,
            Truth(
                np.concatenate([each[:, :2], each[:, 2:] - each[:, :2]], axis=1),
                np.ones(len(each)),
                np.zeros(len(each), np.int64),
                np.zeros(len(each), np.bool_),
            ),
        )
        for index, each in enumerate(boxes)
    ]
    return CocoDataSet("train", Path("a.json"), (Label(1, "thing"),), pictures, BoxCounts())


def random_boxes(count: int, sides: tuple[float, float], ratio: float = 1.0, seed: int = 0) -> np.ndarray:  # type: ignore[type-arg]
    """`ratio`: height over width, give or take a tenth."""
    rng = np.random.default_rng(seed)
    side = np.exp(rng.uniform(*np.log(sides), count))
    stretch = np.sqrt(ratio * rng.uniform(0.9, 1.1, count))
    sizes = np.stack([side / stretch, side * stretch], axis=1)
    low = rng.uniform(0, 1, (count, 2)) * (np.array([500, 300]) - sizes).clip(0)
    return np.concatenate([low, low + sizes], axis=1)


@pytest.mark.parametrize("stride", ["exact", "torchvision"])
def test_the_best_anchor_is_the_best_of_all_anchors_of_the_grid(stride: str) -> None:
    config = AnchorConfig(base_sizes=(16, 32, 64, 128, 256), stride=stride)  # type: ignore[arg-type]
    boxes = random_boxes(60, (4, 290))
    objects = canvas_objects(data_set([boxes[:35], np.zeros((0, 4)), boxes[35:]]).pictures, RESIZE)
    height, width = 256, 416
    assert (objects.canvases == [height, width]).all()
    grids = [(-(-height // 2**level), -(-width // 2**level)) for level in config.levels]
    levels = Anchors(config)((height, width), grids)
    resized = resized_size(300, 500, RESIZE)
    scaled = torch.from_numpy(boxes * ([resized[1] / 500, resized[0] / 300] * 2)).float()
    iou, level = torch.stack([box_iou(scaled, anchors).amax(dim=1) for anchors in levels]).max(dim=0)
    best = best_anchors(objects, config)
    np.testing.assert_allclose(best.iou, iou, atol=1e-5)
    assert (best.level == level.numpy() + 3).mean() > 0.95  # levels may tie


def test_anchors_that_fit_get_no_suggestion() -> None:
    fit = fit_anchors(data_set([random_boxes(200, (40, 250))]), RESIZE, AnchorConfig(), LossConfig())
    assert fit.recall > 0.97
    assert fit.suggestion is None
    assert "No other sizes and ratios" in fit.table()


def test_small_tall_objects_get_smaller_and_taller_anchors_that_reach_them() -> None:
    boxes = random_boxes(300, (8, 60), ratio=5)
    fit = fit_anchors(data_set([boxes]), RESIZE, AnchorConfig(), LossConfig())
    assert fit.recall < 0.5
    assert fit.suggestion is not None
    better = fit_anchors(data_set([boxes]), RESIZE, fit.suggestion.anchors, LossConfig())
    assert better.recall == fit.suggestion.recall > fit.recall + 0.2
    assert fit.suggestion.anchors.base_sizes[0] < 32
    assert min(fit.suggestion.anchors.aspect_ratios) > 3
    assert fit.suggestion.flags in fit.table()


@pytest.mark.parametrize(("ratio", "suggested"), [(1 / 6, 1 / 6), (6, 6)])
def test_objects_of_one_ratio_get_one(ratio: float, suggested: float) -> None:
    side = np.linspace(20, 90, 300)
    width, height = side / ratio**0.5, side * ratio**0.5
    corner = np.full(300, 5.0)
    boxes = np.stack([corner, corner, corner + width, corner + height], axis=1)
    fit = fit_anchors(data_set([boxes]), RESIZE, AnchorConfig(), LossConfig())
    assert fit.suggestion is not None
    assert fit.suggestion.anchors.aspect_ratios == (pytest.approx(suggested, rel=0.05),)


def test_a_ratio_is_suggested_for_what_it_reaches() -> None:
    boxes = np.concatenate([random_boxes(150, (20, 60), ratio, seed=index) for index, ratio in enumerate((0.15, 6.0))])
    fit = fit_anchors(data_set([boxes], size=(500, 500)), ResizePolicy(500, 500), AnchorConfig(), LossConfig())
    assert fit.suggestion is not None
    assert len(fit.suggestion.anchors.aspect_ratios) == 2


def test_positive_anchors_are_counted_on_each_level() -> None:
    box = np.array([[101.3, 47.1, 178.9, 120.2]])  # about 60 px on the canvas
    fit = fit_anchors(data_set([box, np.zeros((0, 4)), box]), RESIZE, AnchorConfig(), LossConfig())
    grids = [(-(-256 // 2**level), -(-416 // 2**level)) for level in range(3, 8)]
    scaled = torch.from_numpy(box * ([400 / 500, 240 / 300] * 2)).float()
    counts = [int((box_iou(scaled, anchors) >= 0.5).sum()) for anchors in Anchors(AnchorConfig())((256, 416), grids)]
    assert fit.positives == tuple(counts)
    assert min(counts[:2]) > 10 and counts[2:] == [0, 0, 0]
    assert [part for _, part, _ in fit.by_level()] == [0, 1, 0, 0, 0]


def test_a_data_set_without_objects_has_no_fit_and_no_suggestion() -> None:
    fit = fit_anchors(data_set([np.zeros((0, 4))] * 2), RESIZE, AnchorConfig(), LossConfig())
    assert np.isnan(fit.recall)
    assert fit.suggestion is None
    assert fit.positives == (0, 0, 0, 0, 0)


def test_the_command_line_shows_the_fit_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny_data(tmp_path / "data")
    sizes = ["--shorter-side", "64", "--longest-side", "96", "--base-sizes", "24", "48", "96"]
    assert main(["anchors", "--data", str(folder), "--preset", "demo", *sizes]) == 0
    shown = capsys.readouterr().out
    assert "of 7 objects have an anchor at IoU 0.5 or more" in shown
    assert [line.split()[0] for line in shown.splitlines() if line.startswith("P")] == ["P3", "P4", "P5"]


def test_typical_ratios_are_those_that_the_objects_have() -> None:
    boxes = np.concatenate([random_boxes(100, (30, 60), ratio, seed=int(ratio)) for ratio in (0.25, 1, 3)])
    objects = canvas_objects(data_set([boxes], size=(400, 400)).pictures, ResizePolicy(400, 400))
    assert typical_ratios(objects, 3) == pytest.approx((0.25, 1, 3), rel=0.05)
