"""Who is responsible for which object: the thresholds, the edges, and torchvision's matcher."""

import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from training.matcher import BACKGROUND, IGNORED, match

NONE = torch.zeros(0, 4)


def matched(anchors: list[list[float]], boxes: list[list[float]], ignored: torch.Tensor = NONE) -> list[int]:
    return match(
        torch.tensor(anchors).reshape(-1, 4),
        torch.tensor(boxes).reshape(-1, 4),
        ignored,
        fg_iou_threshold=0.5,
        bg_iou_threshold=0.4,
    ).tolist()


def test_an_iou_of_exactly_a_half_is_positive_and_of_exactly_two_fifths_is_ignored() -> None:
    box = [0.0, 0, 10, 10]
    best, half, two_fifths, below = [0.0, 0, 10, 10], [0.0, 0, 10, 5], [0.0, 0, 10, 4], [0.0, 0, 10, 3.9]
    assert matched([best, half, two_fifths, below], [box]) == [0, 0, IGNORED, BACKGROUND]


def test_each_object_keeps_its_best_anchor_however_small_their_overlap() -> None:
    assert matched([[0.0, 0, 10, 10], [90.0, 90, 99, 99]], [[8.0, 8, 30, 30]]) == [0, BACKGROUND]


def test_all_anchors_that_tie_for_an_objects_best_are_kept() -> None:
    assert matched([[0.0, 0, 10, 10], [20.0, 0, 30, 10]], [[5.0, 0, 25, 10]]) == [0, 0]


def test_an_object_that_no_anchor_touches_matches_none() -> None:
    assert matched([[0.0, 0, 10, 10]], [[50.0, 50, 60, 60]]) == [BACKGROUND]


def test_without_objects_all_anchors_are_background() -> None:
    assert matched([[0.0, 0, 10, 10]], []) == [BACKGROUND]


def test_without_anchors_there_is_nothing_to_match() -> None:
    assert matched([], [[0.0, 0, 1, 1]]) == []


def test_background_anchors_inside_an_ignored_region_do_not_count() -> None:
    region = torch.tensor([[0.0, 0, 50, 50]])
    anchors = [[0.0, 0, 10, 10], [45.0, 0, 55, 10], [46.0, 0, 56, 10], [20.0, 20, 30, 30]]
    assert matched(anchors, [[20.0, 20, 30, 30]], region) == [IGNORED, IGNORED, BACKGROUND, 0]


def test_the_matches_are_torchvisions_on_random_boxes() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        corners = torch.rand(400, 2, generator=generator) * 100
        anchors = torch.cat([corners, corners + 5 + torch.rand(400, 2, generator=generator) * 40], dim=1).round()
        boxes = anchors[torch.randperm(400, generator=generator)[:7]] + torch.randint(
            -3, 4, (7, 1), generator=generator
        )
        theirs = Matcher(0.5, 0.4, allow_low_quality_matches=True)(box_iou(boxes, anchors))
        ours = match(anchors, boxes, NONE, fg_iou_threshold=0.5, bg_iou_threshold=0.4)
        assert torch.equal(ours, theirs)
