"""Networks with random weights that nevertheless detect: for tests of the way from weights to answers.

A fresh network scores every anchor alike and moves no box. `enliven` gives it batch-norm statistics from real forward
passes and scales both output layers, so that of each picture hundreds of (anchor, class) pairs score between 0.05 and
0.9, and boxes leave their anchors. It works on torchvision's RetinaNet too, whose names ours are.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from model.candidates import IMAGE_MEAN, IMAGE_STD
from model.metadata import Label, ResizePolicy
from model.retinanet import ClassificationHead, RegressionHead, RetinaNet, RetinaNetConfig
from model.types import Candidates, Detections, Pixels
from training.checkpoint import Checkpoint
from training.config import TrainConfig

TINY = RetinaNetConfig(
    backbone="resnet18", backbone_width=0.25, backbone_norm="batch", fpn_channels=16, head_channels=16, head_convs=1
)
SMALL_CANVAS = ResizePolicy(shorter_side=128, longest_side=224)
PYRAMID: tuple[dict[int, str], ...] = (
    {level: f"fpn.layer_blocks.{level}.0" for level in range(3)},
    {3: "fpn.extra_blocks.p6"},
    {4: "fpn.extra_blocks.p7"},
)
"""The convolutions that make P3 to P7, in the order in which one depends on another. Each gets a bias as large as what
it answers, so that every level, few as its cells may be, has classes that it favours."""
SPREAD = (1, 1.3, 1.8, 3, 9)
"""Standard deviation of each level's answer; in the heads the zeros around a small map damp it."""
SAME_BOX_PX = 0.01
PAIRS_PASSING = 400
"""(anchor, class) pairs of a picture above score 0.05, about."""


def draw(height: int, width: int, seed: int) -> Pixels:
    """Coloured rectangles, on one another."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 128, np.uint8)
    for _ in range(100):
        y, x = rng.integers(-16, [height, width]).clip(0)
        image[y : y + rng.integers(4, 64), x : x + rng.integers(4, 64)] = rng.integers(0, 240, 3)
    return image + rng.integers(0, 16, image.shape, np.uint8)


def tiny_checkpoint(
    num_classes: int = 3,
    config: RetinaNetConfig = TINY,
    *,
    lively: bool = True,
    resize: ResizePolicy = SMALL_CANVAS,
) -> Checkpoint:
    """Labels have gaps: ids 1, 3, 5, ..."""
    torch.manual_seed(0)
    network = RetinaNet(config, num_classes)
    if lively:
        enliven(network, [draw(128, 192, seed) for seed in range(4)])
    labels = tuple(Label(2 * column + 1, f"thing {column}") for column in range(num_classes))
    return Checkpoint(TrainConfig(model=config, resize=resize), labels, network.state_dict())


def enliven(network: nn.Module, pictures: Sequence[Pixels]) -> None:
    """Equal pictures in size, please."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    images = (pixels - torch.tensor(IMAGE_MEAN).view(3, 1, 1)) / torch.tensor(IMAGE_STD).view(3, 1, 1)
    backbone, head = network.get_submodule("backbone"), network.get_submodule("head")
    with torch.no_grad():
        _gather_statistics(backbone, images)
        network.eval()
        for names in PYRAMID:
            levels = _levels(backbone, images)
            for level, name in names.items():
                if level < len(levels):  # P6 and P7 may be absent
                    _rescale(backbone.get_submodule(name), SPREAD[level] / float(levels[level].std()))
                    bias = backbone.get_parameter(f"{name}.bias")
                    bias.copy_(1.5 * SPREAD[level] * torch.randn(bias.shape))
        levels = _levels(backbone, images)
        logits = torch.cat(_each(head.get_submodule("classification_head"), "cls_logits", levels))
        deltas = _each(head.get_submodule("regression_head"), "bbox_reg", levels)
        best, passing = logits.topk(PAIRS_PASSING * len(pictures)).values[[0, -1]]
        _rescale(head.get_submodule("classification_head.cls_logits"), 5 / float(best - passing), at=float(passing))
        _rescale(head.get_submodule("regression_head.bbox_reg"), 0.15 / max(float(level.std()) for level in deltas))


def _gather_statistics(backbone: nn.Module, images: Tensor) -> None:
    for norm in backbone.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # the mean of all passes
    backbone.train()
    for flipped in (images, images.flip(3)):
        backbone(flipped)


def _levels(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    levels = backbone(images)
    return list(levels.values()) if isinstance(levels, Mapping) else levels


def _each(subnet: nn.Module, output: str, levels: Sequence[Tensor]) -> list[Tensor]:
    convs, predictor = (subnet.get_submodule(name) for name in ("conv", output))
    ours = isinstance(subnet, ClassificationHead | RegressionHead)  # whose layers take all levels at once
    features = convs(list(levels)) if ours else [convs(level) for level in levels]
    return [predictor(feature).flatten() for feature in features]


def _rescale(layer: nn.Module, factor: float, at: float | None = None) -> None:
    """Multiply what it answers; `at`: such that an answer of this becomes -3, a score of 0.05."""
    assert isinstance(layer, nn.Conv2d) and layer.bias is not None
    layer.weight *= factor
    layer.bias *= factor
    if at is not None:
        layer.bias += -3 - at * factor


def missing(
    wanted: Detections | Candidates,
    found: Detections | Candidates,
    *,
    score_tolerance: float,
    iou: float = 0.98,
    from_score: float = 0.1,
) -> tuple[int, int]:
    """Count the detections of `wanted` that score `from_score` or more without a counterpart, and all of them."""
    sure = wanted.scores >= from_score
    overlap = box_iou(torch.from_numpy(wanted.boxes[sure]), torch.from_numpy(found.boxes)).numpy() >= iou
    # a box that clipping left without area overlaps nothing, not even itself
    overlap |= np.abs(wanted.boxes[sure, None] - found.boxes).max(axis=-1) <= SAME_BOX_PX
    same_label = wanted.labels[sure, None] == found.labels
    near = np.abs(wanted.scores[sure, None] - found.scores) <= score_tolerance
    return int((~(overlap & same_label & near).any(axis=1)).sum()), int(sure.sum())


def assert_agree(
    pairs: Sequence[tuple[Detections, Detections]], *, score_tolerance: float, share_excepted: float = 0.01
) -> None:
    """Each side's detections have a counterpart on the other; a hundredth may lack it, over all pictures."""
    for side in (pairs, [(b, a) for a, b in pairs]):
        counts = np.sum([missing(a, b, score_tolerance=score_tolerance) for a, b in side], axis=0)
        assert counts[1] >= 20 * len(pairs), f"only {counts[1]} detections: nothing is shown"
        assert counts[0] <= share_excepted * counts[1], f"{counts[0]} of {counts[1]} detections have no counterpart"
