"""The losses, against the article's scenarios, torchvision's losses, and torchvision's RetinaNet as a whole."""

import math

import pytest
import torch
import torchvision
from torchvision.ops import sigmoid_focal_loss

from model.anchors import AnchorConfig, encode_boxes
from model.retinanet import Predictions, RetinaNet, RetinaNetConfig
from training.config import LossConfig
from training.loss.losses import focal_loss_sum, retinanet_losses
from training.transforms import TensorTarget


def focal_loss_of(probability: float, truth: float, alpha: float = 0.25, gamma: float = 2.0) -> float:
    logit = torch.tensor([[math.log(probability / (1 - probability))]], dtype=torch.float64)
    positive = torch.zeros(int(truth), dtype=torch.int64)
    ignored = torch.zeros(1, dtype=torch.bool)
    return focal_loss_sum(logit, (positive, positive), ignored, alpha=alpha, gamma=gamma).item()


@pytest.mark.parametrize(
    ("probability", "truth", "expected"),
    [
        # the article's scenarios, with alpha_t = 1 - alpha for background
        (0.9, 1, 0.25 * 0.01 * 0.1053605),
        (0.1, 0, 0.75 * 0.01 * 0.1053605),
        (0.1, 1, 0.4663),
        (0.9, 0, 1.3988),
        (0.99, 1, 0.25 * 1e-4 * 0.0100503),
        (0.01, 0, 0.75 * 1e-4 * 0.0100503),
    ],
)
def test_the_articles_scenarios_have_these_losses(probability: float, truth: float, expected: float) -> None:
    assert focal_loss_of(probability, truth) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("truth", [0.0, 1.0])
def test_with_gamma_0_and_no_alpha_it_is_plain_cross_entropy(truth: float) -> None:
    entropy = -math.log(0.3 if truth else 0.7)
    assert focal_loss_of(0.3, truth, alpha=-1, gamma=0) == pytest.approx(entropy)


@pytest.mark.parametrize(("probability", "expected"), [(0.9, 0.10536), (0.1, 2.30259), (0.99, 0.01005)])
def test_with_gamma_0_it_is_weighted_cross_entropy(probability: float, expected: float) -> None:
    assert 2 * focal_loss_of(probability, 1, alpha=0.5, gamma=0) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("gamma", [2.0, 1.5, 0.0])
def test_the_focal_loss_and_its_gradient_are_torchvisions(gamma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(50, 7, generator=generator, dtype=torch.float64) * 15).requires_grad_()
    ignored = torch.rand(50, generator=generator) < 0.2
    rows = (~ignored).nonzero().squeeze(1)[::4]
    columns = torch.randint(0, 7, rows.shape, generator=generator)
    truth = torch.zeros_like(logits)
    truth[rows, columns] = 1
    expected = sigmoid_focal_loss(logits[~ignored], truth[~ignored], alpha=0.25, gamma=gamma, reduction="sum")
    [expected_gradient] = torch.autograd.grad(3 * expected, logits)
    loss = focal_loss_sum(logits, (rows, columns), ignored, alpha=0.25, gamma=gamma)
    [gradient] = torch.autograd.grad(3 * loss, logits)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


ANCHORS = torch.tensor([[0.0, 0, 10, 10], [100.0, 100, 120, 120], [0.0, 0, 10, 4.5]])
TARGET = TensorTarget(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([1]), torch.zeros(0, 4))
EMPTY = TensorTarget(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))


def predictions(num_images: int) -> Predictions:
    return Predictions(
        torch.zeros(num_images, 3, 2, requires_grad=True), torch.zeros(num_images, 3, 4, requires_grad=True)
    )


def test_ignored_anchors_add_no_loss() -> None:
    losses = retinanet_losses(predictions(1), ANCHORS, [TARGET], LossConfig())
    cross_entropy = math.log(2)
    foreground, background = 0.25 * 0.25 * cross_entropy, 0.75 * 0.25 * cross_entropy
    assert losses.classification.item() == pytest.approx(foreground + 3 * background)  # 2 anchors of 3 count, 2 classes
    assert losses.box.item() == 0


def test_a_picture_without_objects_has_a_classification_loss_and_gradients_but_no_box_loss() -> None:
    made = predictions(1)
    losses = retinanet_losses(made, ANCHORS, [EMPTY], LossConfig())
    losses.total.backward()
    assert losses.classification.item() > 0
    assert losses.box.item() == 0
    assert made.bbox_regression.grad is not None


def test_the_loss_is_divided_by_the_positives_of_the_image_or_of_the_batch() -> None:
    made = predictions(2)
    by_image = retinanet_losses(made, ANCHORS, [TARGET, EMPTY], LossConfig(normaliser="image"))
    by_batch = retinanet_losses(made, ANCHORS, [TARGET, EMPTY], LossConfig(normaliser="batch"))
    assert by_batch.classification.item() == pytest.approx(2 * by_image.classification.item())


def test_only_the_sampled_anchors_add_loss_and_the_seed_says_which() -> None:
    anchors = torch.cat([ANCHORS[:1], torch.arange(100.0, 500)[:, None] + torch.tensor([0.0, 0, 20, 20])])
    made = Predictions(torch.linspace(-3, 3, 401).view(1, -1, 1), torch.zeros(1, 401, 4))
    target = TensorTarget(TARGET.boxes, torch.tensor([0]), TARGET.ignored)
    config = LossConfig(sampled_anchors=4, focal_gamma=0, focal_alpha=0.5)
    sampled = [retinanet_losses(made, anchors, [target], config, seed=seed).classification for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    flat = Predictions(torch.zeros(1, 401, 1), made.bbox_regression)
    four = retinanet_losses(flat, anchors, [target], config)
    assert four.classification.item() == pytest.approx(4 * 0.5 * math.log(2))


def test_anchors_across_the_border_add_loss_unless_they_are_ignored() -> None:
    made, sizes = predictions(1), [(50, 50)]  # the second anchor lies outside
    kept = retinanet_losses(made, ANCHORS, [TARGET], LossConfig(), sizes=sizes)
    ignored = retinanet_losses(made, ANCHORS, [TARGET], LossConfig(border_anchors="ignored"), sizes=sizes)
    background = 2 * 0.75 * 0.25 * math.log(2)
    assert kept.classification.item() - ignored.classification.item() == pytest.approx(background)
    with pytest.raises(ValueError, match="needs the sizes"):
        retinanet_losses(made, ANCHORS, [TARGET], LossConfig(border_anchors="ignored"))


def test_smooth_l1_turns_linear_at_one_ninth() -> None:
    made = Predictions(torch.zeros(1, 3, 2), torch.zeros(1, 3, 4))
    shifted = TensorTarget(torch.tensor([[1.0, 0.5, 11, 10.5]]), TARGET.columns, TARGET.ignored)
    dx, dy, _, _ = encode_boxes(shifted.boxes, ANCHORS[:1])[0].tolist()
    expected = 0.5 * dx**2 * 9 + 0.5 * dy**2 * 9
    losses = retinanet_losses(made, ANCHORS, [shifted], LossConfig())
    assert losses.box.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("backbone", "lowest_level", "p6_from"),
    [("resnet18", 3, "c5"), ("resnet18", 2, "pool"), ("mobilenet_v3_large", 3, "p5")],
)
@pytest.mark.parametrize("canvas", [(64, 96), (65, 97), (33, 130)])
def test_the_anchors_of_a_canvas_are_known_before_the_network_has_seen_it(
    backbone: str, lowest_level: int, p6_from: str, canvas: tuple[int, int]
) -> None:
    sizes = (32.0, 64.0, 128.0, 256.0, 512.0)
    config = RetinaNetConfig(
        backbone=backbone,
        backbone_width=0.25,
        fpn_channels=16,
        head_channels=16,
        head_convs=0,
        p6_from=p6_from,  # type: ignore[arg-type]
        anchors=AnchorConfig(base_sizes=sizes, lowest_level=lowest_level),
    )
    network = RetinaNet(config, 2).eval()
    with torch.no_grad():
        outputs = network(torch.zeros(1, 3, *canvas))
    assert tuple(outputs.grids) == network.anchors.config.grids(canvas)
    assert torch.equal(network.anchors_of(canvas), torch.cat(network.anchors(canvas, outputs.grids)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "config", "loss"),
    [
        ("", RetinaNetConfig(backbone_norm="batch", p6_from="p5"), LossConfig(box_loss="l1")),
        ("_v2", RetinaNetConfig(backbone_norm="batch", head_norm="group"), LossConfig(box_loss="giou")),
    ],
)
def test_losses_and_gradients_are_those_of_torchvisions_retinanet(
    version: str, config: RetinaNetConfig, loss: LossConfig
) -> None:
    from dataclasses import replace

    torch.manual_seed(0)
    build = getattr(torchvision.models.detection, f"retinanet_resnet50_fpn{version}")
    theirs = build(weights=None, weights_backbone=None, num_classes=5).double().eval()
    ours = RetinaNet(replace(config, anchors=AnchorConfig(stride="torchvision")), 5).double().eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 96, 128, dtype=torch.float64)
    boxes = [torch.tensor([[10.0, 10, 60, 70], [30, 5, 110, 90]]), torch.tensor([[5.0, 5, 40, 30]])]
    columns = [torch.tensor([1, 4]), torch.tensor([0])]

    features = list(theirs.backbone(images).values())
    head = theirs.head(features)
    from torchvision.models.detection.image_list import ImageList

    anchors = theirs.anchor_generator(ImageList(images, [(96, 128)] * 2), features)
    truth = [{"boxes": b.double(), "labels": c} for b, c in zip(boxes, columns, strict=True)]
    expected = theirs.compute_loss(truth, head, anchors)
    sum(expected.values()).backward()

    outputs = ours(images)
    grid = torch.cat(ours.anchors((96, 128), outputs.grids)).double()
    targets = [TensorTarget(b.double(), c, torch.zeros(0, 4)) for b, c in zip(boxes, columns, strict=True)]
    found = retinanet_losses(ours.flatten(outputs), grid, targets, loss)
    found.total.backward()

    assert found.classification.item() == pytest.approx(expected["classification"].item(), rel=1e-5)
    assert found.box.item() == pytest.approx(expected["bbox_regression"].item(), rel=1e-5)
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-9, msg=name)
