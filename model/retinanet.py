"""RetinaNet: a backbone, a feature pyramid, and two small convolutional heads shared by every level.

In:   normalised RGB images [N, 3, H, W]
Out:  `LevelOutputs`, one pair of maps for each level; A anchors per cell, K classes Parameter names are
torchvision's (`backbone.body`, `backbone.fpn.inner_blocks`, `head.classification_head.conv`, ...), so that its COCO
checkpoints load with `strict=True`.

Sources: Lin et al. 2017, Focal Loss for Dense Object Detection (RetinaNet, §4); Lin et al. 2017, Feature Pyramid
Networks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.anchors import AnchorConfig, Anchors
from model.backbones import Backbone, NormKind, build_backbone

GROUPS = 32
"""Of GroupNorm in the heads, as torchvision's v2 has it; fewer where the head is narrower than 256."""


@dataclass(frozen=True)
class RetinaNetConfig:
    """The network's shape. The defaults are the paper's ResNet-50."""

    backbone: str = "resnet50"
    backbone_width: float = 1.0
    backbone_norm: NormKind = "frozen"
    norm_epsilon: float = 1e-5
    fpn_channels: int = 256
    p6_from: Literal["c5", "p5"] = "c5"
    head_channels: int = 256
    head_convs: int = 4
    head_norm: Literal["none", "group"] = "none"
    prior: float = 0.01
    """Probability of foreground that every anchor starts with (paper §3.3)."""
    anchors: AnchorConfig = field(default_factory=AnchorConfig)

    def describe(self) -> str:
        width = "" if self.backbone_width == 1 else f"x{self.backbone_width:g}"
        levels = self.anchors.levels
        norm = "" if self.head_norm == "none" else f" {self.head_norm} norm"
        return (
            f"RetinaNet {self.backbone}{width} FPN({self.fpn_channels}, P{levels[0]}-P{levels[-1]} from {self.p6_from})"
            f" head({self.head_convs}x{self.head_channels}{norm}) {self.anchors.per_cell} anchors"
        )


@dataclass(frozen=True, eq=False)
class LevelOutputs:
    """The heads' answer on each pyramid level, lowest first."""

    cls_logits: list[Tensor]
    """[N, A * K, rows, columns] each, anchor-major."""
    bbox_regression: list[Tensor]
    """[N, A * 4, rows, columns] each."""

    @property
    def grids(self) -> list[tuple[int, int]]:
        return [(maps.shape[2], maps.shape[3]) for maps in self.bbox_regression]  # symbolic under the exporter


@dataclass(frozen=True, eq=False)
class Predictions:
    """The same, flattened over levels and cells in the order of the anchors; what the losses take."""

    cls_logits: Tensor
    """[N, anchors, K]"""
    bbox_regression: Tensor
    """[N, anchors, 4]"""


def flatten_maps(maps: Sequence[Tensor], per_anchor: int) -> Tensor:
    """[N, A * per_anchor, rows, columns] of every level -> [N, anchors, per_anchor], in the order of the anchors."""
    return torch.cat([m.permute(0, 2, 3, 1).reshape(m.shape[0], -1, per_anchor) for m in maps], dim=1)


class RetinaNet(nn.Module):
    def __init__(self, config: RetinaNetConfig, num_classes: int, *, pretrained_backbone: bool = False) -> None:
        """num_classes: columns of the classification layer; there is no background column."""
        super().__init__()
        if num_classes < 1:
            raise ValueError("a detector needs at least one class")
        self.config = config
        self.num_classes = num_classes
        backbone = build_backbone(
            config.backbone,
            width=config.backbone_width,
            norm=config.backbone_norm,
            norm_epsilon=config.norm_epsilon,
            pretrained=pretrained_backbone,
        )
        self.backbone = BackboneWithPyramid(backbone, config)
        self.head = Heads(config, num_classes)
        self.anchors = Anchors(config.anchors)

    def forward(self, images: Tensor) -> LevelOutputs:
        levels = self.backbone(images)
        return LevelOutputs(
            [self.head.classification_head(level) for level in levels],
            [self.head.regression_head(level) for level in levels],
        )

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return self.head.regression_head.bbox_reg.weight.dtype

    def flatten(self, outputs: LevelOutputs) -> Predictions:
        return Predictions(flatten_maps(outputs.cls_logits, self.num_classes), flatten_maps(outputs.bbox_regression, 4))


class BackboneWithPyramid(nn.Module):
    def __init__(self, backbone: Backbone, config: RetinaNetConfig) -> None:
        super().__init__()
        self.body = backbone.body
        self.fpn = FeaturePyramid(backbone.channels, config.fpn_channels, config.p6_from)

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.fpn(list(self.body(images).values()))  # type: ignore[no-any-return]


class FeaturePyramid(nn.Module):
    """P3 to P5 by lateral connections and a top-down path; P6 and P7 by strided convolutions above them."""

    def __init__(self, in_channels: Sequence[int], channels: int, p6_from: Literal["c5", "p5"]) -> None:
        super().__init__()
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(c, channels, 1)) for c in in_channels)
        self.layer_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1)) for _ in in_channels
        )
        for conv in [*self.inner_blocks, *self.layer_blocks]:
            nn.init.kaiming_uniform_(conv[0].weight, a=1)
            _zero_bias(conv[0])
        self.extra_blocks = P6P7(in_channels[-1] if p6_from == "c5" else channels, channels)
        self.p6_from = p6_from

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        laterals = [inner(feature) for inner, feature in zip(self.inner_blocks, features, strict=True)]
        for lower in reversed(range(len(laterals) - 1)):
            size = laterals[lower].shape[-2:]
            laterals[lower] = laterals[lower] + F.interpolate(laterals[lower + 1], size=size, mode="nearest")
        pyramid = [layer(lateral) for layer, lateral in zip(self.layer_blocks, laterals, strict=True)]
        return [*pyramid, *self.extra_blocks(features[-1] if self.p6_from == "c5" else pyramid[-1])]


class P6P7(nn.Module):
    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        for conv in (self.p6, self.p7):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            _zero_bias(conv)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        p6 = self.p6(feature)
        return p6, self.p7(F.relu(p6))


class Heads(nn.Module):
    def __init__(self, config: RetinaNetConfig, num_classes: int) -> None:
        super().__init__()
        self.classification_head = ClassificationHead(config, num_classes)
        self.regression_head = RegressionHead(config)


class ClassificationHead(nn.Module):
    def __init__(self, config: RetinaNetConfig, num_classes: int) -> None:
        super().__init__()
        self.conv = _subnet(config)
        self.cls_logits = nn.Conv2d(config.head_channels, config.anchors.per_cell * num_classes, 3, padding=1)
        self.reset_prior(config.prior)

    def reset_prior(self, prior: float) -> None:
        """Initialise the output layer so that every anchor starts with probability `prior` of each class."""
        nn.init.normal_(self.cls_logits.weight, std=0.01)
        assert self.cls_logits.bias is not None
        nn.init.constant_(self.cls_logits.bias, prior_bias(prior))

    def forward(self, level: Tensor) -> Tensor:
        return self.cls_logits(self.conv(level))  # type: ignore[no-any-return]


class RegressionHead(nn.Module):
    def __init__(self, config: RetinaNetConfig) -> None:
        super().__init__()
        self.conv = _subnet(config)
        self.bbox_reg = nn.Conv2d(config.head_channels, config.anchors.per_cell * 4, 3, padding=1)
        nn.init.normal_(self.bbox_reg.weight, std=0.01)
        _zero_bias(self.bbox_reg)

    def forward(self, level: Tensor) -> Tensor:
        return self.bbox_reg(self.conv(level))  # type: ignore[no-any-return]


def prior_bias(prior: float) -> float:
    """The logit of `prior` (paper §4.1): -log((1 - prior) / prior)."""
    return -math.log((1 - prior) / prior)


def _zero_bias(conv: nn.Conv2d) -> None:
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)


def _subnet(config: RetinaNetConfig) -> nn.Sequential:
    layers = []
    channels = config.fpn_channels
    for _ in range(config.head_convs):
        conv = nn.Conv2d(channels, config.head_channels, 3, padding=1, bias=config.head_norm == "none")
        nn.init.normal_(conv.weight, std=0.01)
        norm = []
        if config.head_norm == "group":
            norm.append(nn.GroupNorm(min(GROUPS, config.head_channels // 8), config.head_channels))
        else:
            _zero_bias(conv)
        layers.append(nn.Sequential(conv, *norm, nn.ReLU(inplace=True)))
        channels = config.head_channels
    return nn.Sequential(*layers)
