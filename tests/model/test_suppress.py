from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
import torch
from torchvision.ops import batched_nms, nms

from model.suppress import GRAPH, suppress
from model.types import Candidates, Detections


def candidates(boxes: object, scores: object, labels: object) -> Candidates:
    return Candidates(
        np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(labels, np.int64)
    )


def random_candidates(count: int, classes: int, seed: int = 0) -> Candidates:
    """Clusters of overlapping boxes, some of them clipped at a border of 800 × 1066, a third of them below 0.05."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, [1066, 800], (max(1, count // 15), 2))[rng.integers(0, max(1, count // 15), count)]
    centres += rng.normal(0, 6, (count, 2))
    half = rng.uniform(10, 60, (count, 2))
    boxes = np.concatenate([centres - half, centres + half], axis=1).clip(0, [1066, 800, 1066, 800])
    return candidates(boxes, rng.beta(0.3, 2, count), rng.integers(1, classes + 1, count))


def reference(found: Candidates, score: float, iou: float, best: int, labels: Collection[int] | None) -> Detections:
    """The same meaning by torchvision, one class after another, in the order of the words."""
    kept = []
    passing = np.flatnonzero(found.scores > score)
    for label in np.unique(found.labels[passing]):
        members = passing[found.labels[passing] == label]
        members = members[np.argsort(-found.scores[members], kind="stable")]  # torchvision's own order of ties is open
        falling = torch.arange(len(members), 0, -1).float()
        kept += members[nms(torch.from_numpy(found.boxes[members]), falling, iou).numpy()].tolist()
    if labels is not None:
        kept = [index for index in kept if found.labels[index] in labels]
    order = sorted(kept, key=lambda index: (-found.scores[index], index))[:best]
    return Detections(found.boxes[order], found.scores[order], found.labels[order])


def assert_same(found: Detections, expected: Detections) -> None:
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.boxes, expected.boxes)


def default(found: Candidates, score: float = 0.05, iou: float = 0.5, best: int = 300) -> Detections:
    return suppress(found, score_threshold=score, nms_threshold=iou, max_detections=best)


@pytest.mark.parametrize("classes", [1, 3, 80, 500])
@pytest.mark.parametrize("seed", range(3))
def test_detections_equal_torchvisions_per_class(classes: int, seed: int) -> None:
    found = random_candidates(3000, classes, seed)
    assert_same(default(found), reference(found, 0.05, 0.5, 300, None))


@pytest.mark.parametrize(("score", "iou", "best"), [(0.3, 0.5, 100), (0, 0, 5000), (0, 1, 5000), (0.05, 0.25, 1)])
def test_thresholds_and_limits_mean_what_torchvision_means(score: float, iou: float, best: int) -> None:
    found = random_candidates(1000, 5)
    assert_same(default(found, score, iou, best), reference(found, score, iou, best, None))


@pytest.mark.parametrize("best", [10, 100])
def test_where_the_best_overlap_each_other_the_others_get_their_turn(best: int) -> None:
    """The best candidates are looked at first; here too few of them survive."""
    many, few = random_candidates(40 * best, 3), random_candidates(3 * best, 3, seed=1)
    twins = np.tile(many.boxes[:1], (len(many.boxes), 1))
    found = candidates(
        np.concatenate([twins, few.boxes]),
        np.concatenate([0.5 + many.scores / 2, few.scores / 2]),
        np.concatenate([many.labels, few.labels]),
    )
    answer = default(found, score=0, best=best)
    assert len(answer) == best
    assert (answer.scores < 0.5).sum() == best - 3
    assert_same(answer, reference(found, 0, 0.5, best, None))


def test_detections_equal_batched_nms() -> None:
    found = random_candidates(2000, 10)
    passing = found.scores > 0.05
    boxes, scores, labels = found.boxes[passing], found.scores[passing], found.labels[passing]
    kept = batched_nms(torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(labels), 0.5)[:300].numpy()
    assert_same(default(found), Detections(boxes[kept], scores[kept], labels[kept]))


@pytest.mark.parametrize("label_ids", [{2}, {1, 3, 5}, {99}, set()])
@pytest.mark.parametrize("best", [3, 300])
def test_labels_are_filtered_before_the_best_are_taken(label_ids: set[int], best: int) -> None:
    found = random_candidates(1000, 5)
    answer = suppress(found, score_threshold=0.05, nms_threshold=0.5, max_detections=best, label_ids=label_ids)
    assert_same(answer, reference(found, 0.05, 0.5, best, label_ids))


def test_ties_are_won_by_the_earlier_candidate() -> None:
    far = [[0, 0, 10, 10], [100, 0, 110, 10], [200, 0, 210, 10], [0, 0, 10, 10]]
    answer = default(candidates(far, [0.5, 0.7, 0.5, 0.5], [1, 1, 2, 1]))
    np.testing.assert_array_equal(answer.boxes, np.array(far, np.float32)[[1, 0, 2]])


def test_many_ties_equal_the_reference() -> None:
    found = random_candidates(2000, 3)
    tied = Candidates(found.boxes, np.round(found.scores, 1), found.labels)
    assert_same(default(tied), reference(tied, 0.05, 0.5, 300, None))


def test_a_score_at_the_threshold_is_dropped() -> None:
    answer = default(candidates([[0, 0, 9, 9], [20, 0, 29, 9]], [0.05, 0.0500001], [1, 1]))
    assert len(answer) == 1


def test_an_overlap_at_the_threshold_is_kept_and_one_above_is_dropped() -> None:
    boxes = [[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 5.001]]
    assert len(default(candidates(boxes[:2], [0.9, 0.8], [1, 1]))) == 2
    assert len(default(candidates([boxes[0], boxes[2]], [0.9, 0.8], [1, 1]))) == 1


def test_a_dropped_box_drops_no_other() -> None:
    chain = candidates([[0, 0, 10, 10], [3, 0, 13, 10], [6, 0, 16, 10]], [0.9, 0.8, 0.7], [1, 1, 1])
    np.testing.assert_array_equal(default(chain).scores, np.float32([0.9, 0.7]))


def test_equal_boxes_of_two_classes_are_two_objects_however_large() -> None:
    huge = [[0, 0, 1e7, 1e7], [0, 0, 1e7, 1e7]]
    assert len(default(candidates(huge, [0.9, 0.8], [1, 2]))) == 2
    assert len(default(candidates(huge, [0.9, 0.8], [1, 1]))) == 1


def test_boxes_without_area_overlap_nothing() -> None:
    boxes = [[5, 5, 5, 5], [5, 5, 5, 5], [0, 5, 10, 5], [0, 0, 10, 10]]
    found = candidates(boxes, [0.9, 0.8, 0.7, 0.6], [1, 1, 1, 1])
    assert_same(default(found, iou=0), reference(found, 0.05, 0, 300, None))
    assert len(default(found, iou=0)) == 4


def test_not_a_number_passes_no_threshold_and_drops_no_neighbour() -> None:
    nan = float("nan")
    found = candidates([[0, 0, 9, 9], [nan] * 4, [0, 0, 9, 9], [20, 0, 29, 9]], [nan, 0.9, 0.8, 0.7], [1, 1, 1, 1])
    np.testing.assert_array_equal(default(found).scores, np.float32([0.9, 0.8, 0.7]))


@pytest.mark.parametrize("scores", [[], [-1, -1, 0.01]])
def test_nothing_found_is_no_detections(scores: list[float]) -> None:
    answer = default(candidates(np.zeros((len(scores), 4)), scores, [1] * len(scores)))
    assert len(answer) == 0
    assert (answer.boxes.shape, answer.boxes.dtype) == ((0, 4), np.float32)
    assert (answer.scores.dtype, answer.labels.dtype) == (np.float32, np.int64)


def test_absent_candidates_stay_absent_at_threshold_zero() -> None:
    assert len(default(candidates([[0, 0, 0, 0], [0, 0, 9, 9]], [-1, 0.001], [1, 1]), score=0)) == 1


def test_threads_get_the_answers_of_one() -> None:
    inputs = [random_candidates(1500, 5, seed) for seed in range(12)]
    with ThreadPoolExecutor(6) as pool:
        for together, alone in zip(pool.map(default, inputs), map(default, inputs), strict=True):
            assert_same(together, alone)


def test_the_bytes_in_the_source_are_the_graph_in_its_comment() -> None:
    text = """<ir_version: 10, opset_import: ["" : 18]>
    nms (float[1,n,4] boxes, float[1,c,n] scores, int64 limit, float threshold, float floor) => (int64[k,3] kept) {
        kept = NonMaxSuppression (boxes, scores, limit, threshold, floor)
    }"""
    assert onnx.load_from_string(GRAPH) == onnx.parser.parse_model(text)
