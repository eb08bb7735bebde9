"""The figures of scores, on detections with known values; and AP by a second implementation."""

import contextlib
import io
import math
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval import COCO, COCOeval_faster

from model.types import Detections, coco_results
from tests.training.evaluation.test_own_truth import BCCD, content, loaded, noisy, own_truth
from training.coco import CocoDataSet, load_coco
from training.evaluation.average_precision import average_precision, coco_truth
from training.evaluation.scores import ScoredMatches, best_f1, calibration, calibration_error, confusion, pooled


def ids_of(data_set: CocoDataSet) -> list[int]:
    return [picture.image_id for picture in data_set.pictures]


def assert_agrees(data_set: CocoDataSet, seed: int) -> None:
    """Compare our figures of random results with a second implementation's."""
    results = noisy(data_set, seed)
    report = average_precision(data_set, results, ids_of(data_set))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(coco_truth(data_set, ids_of(data_set)))
        theirs = COCOeval_faster(truth, truth.loadRes([dict(result) for result in results]), "bbox")
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
    ours = [report.ap, report.ap50, report.ap75, report.ap_small, report.ap_medium, report.ap_large]
    expected = [math.nan if figure < 0 else figure for figure in theirs.stats[:6]]
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    assert report.recall_100 == pytest.approx(theirs.stats[8], abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_a_second_implementation_has_the_same_figures(seed: int, tmp_path: Path) -> None:
    assert_agrees(loaded(tmp_path, content(seed)), seed)


@pytest.mark.skipif(not BCCD.exists(), reason=f"{BCCD} is not here")
def test_a_second_implementation_has_the_same_figures_on_real_pictures() -> None:
    assert_agrees(load_coco(BCCD, "val"), 0)


def matches(scores: list[float], found: list[int], num_objects: int) -> ScoredMatches:
    return ScoredMatches(np.array(scores), np.array(found, bool), num_objects)


def test_the_best_threshold_lies_between_two_scores() -> None:
    point = best_f1(matches([0.2, 0.9, 0.8, 0.6], [0, 1, 1, 0], 3))
    assert point is not None
    assert point.threshold == pytest.approx(0.7)
    assert (point.precision, point.recall) == (1, pytest.approx(2 / 3))
    assert point.f1 == pytest.approx(0.8)


def test_equal_scores_are_kept_or_dropped_together() -> None:
    point = best_f1(matches([0.9, 0.5, 0.5, 0.5], [1, 1, 0, 0], 2))
    assert point is not None
    assert (point.threshold, point.recall) == (pytest.approx(0.7), 0.5)


@pytest.mark.parametrize(("scores", "found"), [([], []), ([0.5], [0])])
def test_where_nothing_is_found_there_is_no_best_threshold(scores: list[float], found: list[int]) -> None:
    assert best_f1(matches(scores, found, 3)) is None


def test_probabilities_are_calibrated_and_their_squares_are_not() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random(20_000)
    found = rng.random(20_000) < probability
    assert calibration_error(calibration(ScoredMatches(probability, found, 1))) < 0.02
    assert calibration_error(calibration(ScoredMatches(probability**2, found, 1))) == pytest.approx(1 / 6, abs=0.02)
    assert math.isnan(calibration_error(calibration(pooled([]))))


def test_the_best_f1_of_an_evaluation_is_that_of_trying_each_threshold(tmp_path: Path) -> None:
    of = content(1)
    for annotation in of["annotations"]:
        annotation["category_id"] = 2  # of one class alone the confusion's pairs are AP's
        annotation["iscrowd"] = 0
    data_set = loaded(tmp_path, of)
    results = noisy(data_set, 1)
    report = average_precision(data_set, results, ids_of(data_set))
    assert report.best is not None
    tried = []
    for threshold in np.linspace(0, 0.95, 20):  # scores are tenths
        counts = confusion(data_set, results, ids_of(data_set), threshold)
        right, wrong, missed = counts[0, 0], counts[-1, 0], counts[0, -1]
        tried.append(2 * right / (2 * right + wrong + missed))
    assert report.best.f1 == pytest.approx(max(tried), abs=0.01)  # pairs of equal scores may be made in another order
    assert 0.3 < report.best.f1 < 1


def test_the_truth_is_confused_with_nothing(tmp_path: Path) -> None:
    data_set = loaded(tmp_path, content())
    report = average_precision(data_set, own_truth(data_set), ids_of(data_set))
    objects = np.bincount(np.concatenate([picture.target.columns for picture in data_set.pictures]), minlength=3)
    assert report.confusion is not None
    np.testing.assert_array_equal(report.confusion, np.diag([*objects, 0]))
    assert report.best is not None and report.best.f1 == 1
    assert calibration_error(report.calibration) == 0


def test_classes_taken_for_one_another_and_for_the_background_are_counted(tmp_path: Path) -> None:
    of = content()
    of["annotations"] = [
        {"image_id": 0, "category_id": 2, "bbox": [0, 0, 10, 10]},
        {"image_id": 0, "category_id": 9, "bbox": [20, 0, 10, 10]},
        {"image_id": 0, "category_id": 9, "bbox": [0, 40, 10, 10]},
        {"image_id": 1, "category_id": 2, "bbox": [40, 20, 30, 30], "iscrowd": 1},
    ]
    data_set = loaded(tmp_path, of)
    results = []
    for image, box, score, label in [
        (0, [0, 0, 10, 10], 0.9, 9),  # class 2 taken for 9
        (0, [0, 0, 10, 9], 0.8, 2),  # the same object again: background
        (0, [20, 0, 30, 10], 0.7, 9),  # right
        (1, [45, 25, 50, 30], 0.9, 2),  # in a crowd
        (2, [5, 5, 20, 20], 0.6, 2),  # nothing there
        (2, [5, 5, 20, 20], 0.1, 2),  # below the threshold
    ]:
        results += coco_results(image, Detections(np.float32([box]), np.float32([score]), np.array([label])))
    counts = confusion(data_set, results, ids_of(data_set), 0.2)
    a, absent, b, background = 0, 1, 2, 3  # by class id: 2, 5, 9
    expected = np.zeros((4, 4), int)
    expected[a, b] = expected[b, b] = expected[b, background] = 1
    expected[background, a] = 2
    np.testing.assert_array_equal(counts, expected)
    assert counts[absent].sum() == 0
