"""Who is responsible for which object: the thresholds, the edges, and torchvision's matcher."""

import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from training.loss import matcher
from training.loss.matcher import BACKGROUND, IGNORED, draw_anchors, match, match_inside

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


@pytest.mark.parametrize("pairs", [matcher.PAIRS, 3 * 400, 1])
def test_the_matches_are_torchvisions_on_random_boxes(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matcher, "PAIRS", pairs)
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


def test_anchors_across_the_pictures_border_are_ignored_and_no_objects_best() -> None:
    anchors = torch.tensor([[-1.0, 0, 9, 10], [0.0, 0, 10, 6], [50.0, 50, 60, 60], [55.0, 50, 65, 60]])
    object_ = torch.tensor([[0.0, 0, 10, 10]])
    found = match_inside(anchors, object_, NONE, (60, 60), fg_iou_threshold=0.7, bg_iou_threshold=0.3)
    assert found.tolist() == [IGNORED, 0, BACKGROUND, IGNORED]


def drawn(matches: torch.Tensor, seed: int) -> torch.Tensor:
    return draw_anchors(matches, 256, 128, torch.Generator().manual_seed(seed))


def counts(matches: torch.Tensor) -> tuple[int, int]:
    return int((matches >= 0).sum()), int((matches == BACKGROUND).sum())


def test_of_many_anchors_128_positive_and_128_background_ones_are_drawn() -> None:
    matches = torch.cat([torch.arange(300), torch.full((5000,), BACKGROUND), torch.full((40,), IGNORED)])
    kept = drawn(matches, seed=0)
    assert counts(kept) == (128, 128)
    assert torch.equal(kept[kept != IGNORED], matches[kept != IGNORED])
    assert (kept[-40:] == IGNORED).all()


def test_where_positives_are_few_background_fills_the_sample() -> None:
    matches = torch.cat([torch.arange(3), torch.full((5000,), BACKGROUND)])
    assert counts(drawn(matches, seed=0)) == (3, 253)
    assert counts(drawn(matches[:10], seed=0)) == (3, 7)


def test_the_seed_alone_decides_which_anchors_are_drawn() -> None:
    matches = torch.full((5000,), BACKGROUND)
    assert torch.equal(drawn(matches, seed=1), drawn(matches, seed=1))
    assert not torch.equal(drawn(matches, seed=1), drawn(matches, seed=2))


def test_what_is_compared_at_once_does_not_grow_with_the_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    corners = torch.rand(40_000, 2, generator=torch.Generator().manual_seed(0)) * 800
    anchors = torch.cat([corners, corners + 30], dim=1)
    compared: list[int] = []

    def counted(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        compared.append(len(boxes) * len(others))
        return box_iou(boxes, others)

    monkeypatch.setattr(matcher, "box_iou", counted)
    matches = match(anchors, anchors[:1400], anchors[-1400:], fg_iou_threshold=0.5, bg_iou_threshold=0.4)
    assert matches[:1400].tolist() == list(range(1400))
    assert (matches[-1400:] != BACKGROUND).all()
    assert sum(compared) == 1400 * len(anchors)
    assert max(compared) <= matcher.PAIRS
