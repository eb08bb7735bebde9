"""Selection of candidates, against a plain top-k over all pairs and torchvision's own post-processing."""

import numpy as np
import pytest
import torch

from model.candidates import IMAGE_MEAN, IMAGE_STD, PRE_NMS_TOP_K, CandidateDetector, Normalise
from model.metadata import Label
from model.retinanet import RetinaNet
from tests.support.networks import TINY


def build(num_classes: int, ids: list[int] | None = None) -> CandidateDetector:
    torch.manual_seed(0)
    network = RetinaNet(TINY, num_classes)
    torch.nn.init.normal_(network.head.classification_head.cls_logits.weight, std=0.5)
    torch.nn.init.normal_(network.head.regression_head.bbox_reg.weight, std=0.5)
    labels = [Label(class_id, f"label {class_id}") for class_id in ids or range(num_classes)]
    return CandidateDetector(network, labels).eval()


def noise(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def test_pixels_are_normalised_as_torchvision_does_and_padding_is_zero_afterwards() -> None:
    images = noise(2, 8, 6)
    normalised = Normalise()(images, torch.tensor([[8, 6], [5, 3]]))
    expected = (images[0].numpy() / 255 - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    np.testing.assert_allclose(normalised[0].permute(1, 2, 0).numpy(), expected, atol=2e-6)
    assert not normalised[1, :, 5:].any()
    assert not normalised[1, :, :, 3:].any()
    assert normalised[1, :, :5, :3].all()


@pytest.mark.parametrize("num_classes", [1, 3, 500])
def test_the_two_step_selection_is_the_top_k_over_all_pairs(num_classes: int) -> None:
    detector = build(num_classes)
    images, sizes = noise(2, 128, 160), torch.tensor([[128, 160], [100, 90]])
    with torch.no_grad():
        _, scores, _ = detector(images, sizes)
        outputs = detector.network(detector.normalise(images, sizes))
    for level, maps in enumerate(outputs.cls_logits):
        pairs = torch.sigmoid(maps.flatten(1))
        kept = min(PRE_NMS_TOP_K, pairs.shape[1])
        found = scores[:, level * PRE_NMS_TOP_K : (level + 1) * PRE_NMS_TOP_K]
        torch.testing.assert_close(found[:, :kept], pairs.topk(kept).values)
        assert (found[:, kept:] == -1).all()


def test_each_candidate_has_the_score_its_anchor_and_class_have() -> None:
    detector = build(4, ids=[3, 7, 8, 90])
    images, sizes = noise(1, 64, 96), torch.tensor([[60, 90]])
    with torch.no_grad():
        boxes, scores, labels = detector(images, sizes)
        outputs = detector.network(detector.normalise(images, sizes))
        predictions = detector.network.flatten(outputs)
    anchors = torch.cat(detector.network.anchors((64, 96), outputs.grids))
    from torchvision.models.detection._utils import BoxCoder
    from torchvision.ops import clip_boxes_to_image

    decoded = clip_boxes_to_image(BoxCoder((1.0,) * 4).decode_single(predictions.bbox_regression[0], anchors), (60, 90))
    present = scores[0] >= 0
    distances = torch.cdist(boxes[0, present], decoded, p=torch.inf)
    nearest = distances.min(dim=1)
    assert nearest.values.max() < 1e-3
    columns = torch.tensor([{3: 0, 7: 1, 8: 2, 90: 3}[label] for label in labels[0, present].tolist()])
    all_scores = torch.sigmoid(predictions.cls_logits[0])
    # several anchors may decode to the same clipped box: one of them must carry the score
    same_box = distances < 1e-3
    same_score = (all_scores[:, columns].T - scores[0, present, None]).abs() < 1e-6
    assert (same_box & same_score).any(dim=1).all()


def test_boxes_are_clipped_to_the_valid_part_of_the_canvas() -> None:
    boxes, _, _ = build(2)(noise(1, 64, 96), torch.tensor([[40, 70]]))
    assert boxes[..., [0, 2]].max() <= 70
    assert boxes[..., [1, 3]].max() <= 40
    assert boxes.min() >= 0


def test_an_image_alone_and_in_a_batch_has_the_same_candidates() -> None:
    detector = build(3)
    images, sizes = noise(3, 64, 96), torch.tensor([[64, 96], [50, 60], [1, 1]])
    with torch.no_grad():
        together = detector(images, sizes)
        for index in range(3):
            alone = detector(images[index : index + 1], sizes[index : index + 1])
            torch.testing.assert_close(alone[1][0], together[1][index], atol=1e-5, rtol=0)


def test_labels_must_fit_the_networks_columns() -> None:
    with pytest.raises(ValueError, match="2 labels for a network of 3 classes"):
        CandidateDetector(RetinaNet(TINY, 3), [Label(1, "a"), Label(2, "b")])
