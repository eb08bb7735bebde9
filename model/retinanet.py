"""RetinaNet: a backbone, a feature pyramid, and two small convolutional heads shared by every level.

With other values the network is the region proposal network on a pyramid (one class, `head="shared"`, levels P2 to P6),
or a baseline without a pyramid: the top level alone, or levels without a top-down path.

In:   normalised RGB images [N, 3, H, W]
Out:  `LevelOutputs`, one pair of maps for each level; A anchors per cell, K classes

Parameter names are torchvision's (`backbone.body`, `backbone.fpn.inner_blocks`, `head.classification_head.conv`, ...),
so that its COCO checkpoints load with `strict=True`.

Sources: Lin et al. 2017, Focal Loss for Dense Object Detection (RetinaNet, §4); Lin et al. 2017, Feature Pyramid
Networks (§4.1 for proposals, §5.1 for the comparisons).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from model.anchors import AnchorConfig, Anchors
from model.backbones import STAGE_LEVELS, Backbone, NormKind, build_backbone
from model.pyramid import FeaturePyramid, zero_bias

GROUPS = 32
"""Groups of GroupNorm in the heads, as in torchvision's v2; a head narrower than 256 has fewer."""


@dataclass(frozen=True)
class RetinaNetConfig:
    """The network's shape. The defaults are the paper's ResNet-50."""

    backbone: str = "resnet50"
    backbone_width: float = 1.0
    backbone_norm: NormKind = "frozen"
    norm_epsilon: float = 1e-5
    fpn_channels: int = 256
    pyramid: Annotated[
        Literal["fpn", "rough", "top"],
        "rough: levels without the top-down path; top: P5 alone, with the anchors of every level",
    ] = "fpn"
    p6_from: Annotated[
        Literal["c5", "p5", "pool"], "levels above P5: strided convolutions of C5 or P5; pool: every second cell of P5"
    ] = "c5"
    head: Annotated[
        Literal["separate", "shared"],
        "shared: both outputs are 1x1 convolutions of one subnet, as the region proposal network has it",
    ] = "separate"
    head_channels: int = 256
    head_convs: int = 4
    head_norm: Literal["none", "group", "batch"] = "none"
    """Norm of the heads. batch: all levels share the convolutions, but each level has batch norms of its own, because
    levels differ in their statistics (as in EfficientDet, Tan et al. 2020)."""
    prior: float = 0.01
    """Initial probability of foreground of every anchor (paper §3.3)."""
    anchors: AnchorConfig = field(default_factory=AnchorConfig)

    @property
    def level_anchors(self) -> AnchorConfig:
        """The anchors of the heads' levels; for `top`, the top level has all sizes."""
        if self.pyramid != "top":
            return self.anchors
        first, top = self.anchors.base_sizes[0], STAGE_LEVELS[-1]
        scales = tuple(size / first * scale for size in self.anchors.base_sizes for scale in self.anchors.scales)
        return replace(self.anchors, base_sizes=(first,), scales=scales, lowest_level=top)

    def describe(self) -> str:
        width = "" if self.backbone_width == 1 else f"x{self.backbone_width:g}"
        levels = self.level_anchors.levels
        pyramid = {"fpn": "FPN", "rough": "rough pyramid", "top": "top level"}[self.pyramid]
        norm = "" if self.head_norm == "none" else f" {self.head_norm} norm"
        head = "head" if self.head == "separate" else "shared head"
        return (
            f"RetinaNet {self.backbone}{width} {pyramid}({self.fpn_channels}, P{levels[0]}-P{levels[-1]} from "
            f"{self.p6_from}) {head}({self.head_convs}x{self.head_channels}{norm}) "
            f"{self.level_anchors.per_cell} anchors from {self.anchors.base_sizes[0]:g} to "
            f"{self.anchors.base_sizes[-1]:g} px"
        )


@dataclass(frozen=True, eq=False)
class LevelOutputs:
    """The heads' outputs on each pyramid level, lowest first."""

    cls_logits: list[Tensor]
    """[N, A * K, rows, columns] each, anchor-major."""
    bbox_regression: list[Tensor]
    """[N, A * 4, rows, columns] each."""

    @property
    def grids(self) -> list[tuple[int, int]]:
        return [(maps.shape[2], maps.shape[3]) for maps in self.bbox_regression]  # symbolic under the exporter


@dataclass(frozen=True, eq=False)
class Predictions:
    """The heads' outputs, flattened over levels and cells in the order of the anchors; input of the losses."""

    cls_logits: Tensor
    """[N, anchors, K]"""
    bbox_regression: Tensor
    """[N, anchors, 4]"""


def flatten_maps(maps: Sequence[Tensor], per_anchor: int) -> Tensor:
    """Flatten each level's [N, A * per_anchor, rows, columns] to [N, anchors, per_anchor], in the order of the
    anchors."""
    return torch.cat([m.permute(0, 2, 3, 1).reshape(m.shape[0], -1, per_anchor) for m in maps], dim=1)


class RetinaNet(nn.Module):
    def __init__(self, config: RetinaNetConfig, num_classes: int, *, pretrained_backbone: bool = False) -> None:
        """Make a network. `num_classes`: columns of the classification layer, which has no background column."""
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
            lowest_level=config.level_anchors.lowest_level,
        )
        self.backbone = BackboneWithPyramid(backbone, config)
        self.head = Heads(config, num_classes)
        self.anchors = Anchors(config.level_anchors)

    def forward(self, images: Tensor) -> LevelOutputs:
        levels = self.head.conv(self.backbone(images))
        return LevelOutputs(self.head.classification_head(levels), self.head.regression_head(levels))

    def anchors_of(self, canvas: tuple[int, int]) -> Tensor:
        """Make the anchors [anchors, 4] of a canvas (height, width), xyxy in its pixels."""
        return torch.cat(self.anchors(canvas, self.anchors.config.grids(canvas)))

    @property
    def dtype(self) -> torch.dtype:
        """The type that the network computes in."""
        return self.head.regression_head.bbox_reg.weight.dtype

    def flatten(self, outputs: LevelOutputs) -> Predictions:
        return Predictions(flatten_maps(outputs.cls_logits, self.num_classes), flatten_maps(outputs.bbox_regression, 4))


class BackboneWithPyramid(nn.Module):
    def __init__(self, backbone: Backbone, config: RetinaNetConfig) -> None:
        super().__init__()
        self.body = backbone.body
        self.fpn = FeaturePyramid(
            backbone.channels,
            config.fpn_channels,
            top_down=config.pyramid == "fpn",
            extra_from=config.p6_from,
            num_extra=config.level_anchors.levels[-1] - STAGE_LEVELS[-1],
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.fpn(list(self.body(images).values()))  # type: ignore[no-any-return]


class Heads(nn.Module):
    def __init__(self, config: RetinaNetConfig, num_classes: int) -> None:
        super().__init__()
        self.conv = _subnet(config) if config.head == "shared" else nn.Sequential()
        self.classification_head = ClassificationHead(config, num_classes)
        self.regression_head = RegressionHead(config)


class ClassificationHead(nn.Module):
    def __init__(self, config: RetinaNetConfig, num_classes: int) -> None:
        super().__init__()
        self.conv = _own_subnet(config)
        self.cls_logits = _output_layer(config, config.level_anchors.per_cell * num_classes)
        self.reset_prior(config.prior)

    def reset_prior(self, prior: float) -> None:
        """Initialise the output layer so that every anchor starts with probability `prior` of each class."""
        nn.init.normal_(self.cls_logits.weight, std=0.01)
        assert self.cls_logits.bias is not None
        nn.init.constant_(self.cls_logits.bias, prior_bias(prior))

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [self.cls_logits(level) for level in self.conv(levels)]


class RegressionHead(nn.Module):
    def __init__(self, config: RetinaNetConfig) -> None:
        super().__init__()
        self.conv = _own_subnet(config)
        self.bbox_reg = _output_layer(config, config.level_anchors.per_cell * 4)
        nn.init.normal_(self.bbox_reg.weight, std=0.01)
        zero_bias(self.bbox_reg)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [self.bbox_reg(level) for level in self.conv(levels)]


def prior_bias(prior: float) -> float:
    """Return the logit of `prior` (paper §4.1): -log((1 - prior) / prior)."""
    return -math.log((1 - prior) / prior)


class HeadLayer(nn.Sequential):
    """A convolution, an optional norm and a ReLU, for the maps of every level: [N, channels, rows, columns] each."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None) -> None:
        """Make a layer. `norm`: one norm for all levels, or an `nn.ModuleList` with one for each."""
        super().__init__(conv, *(() if norm is None else (norm,)), nn.ReLU(inplace=True))
        self.has_norm = norm is not None

    @property
    def conv(self) -> nn.Module:
        return self[0]

    @property
    def norm(self) -> nn.Module | None:
        return self[1] if self.has_norm else None

    @property
    def relu(self) -> nn.Module:
        return self[-1]

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        levels = [self.conv(level) for level in levels]
        if isinstance(self.norm, nn.ModuleList):
            levels = [norm(level) for norm, level in zip(self.norm, levels, strict=True)]
        elif self.norm is not None:
            levels = [self.norm(level) for level in levels]
        return [self.relu(level) for level in levels]


def _output_layer(config: RetinaNetConfig, out_channels: int) -> nn.Conv2d:
    kernel = 1 if config.head == "shared" else 3
    return nn.Conv2d(config.head_channels, out_channels, kernel, padding=kernel // 2)


def _own_subnet(config: RetinaNetConfig) -> nn.Sequential:
    """Make the convolutions of one head; none if both heads share theirs."""
    return nn.Sequential() if config.head == "shared" else _subnet(config)


def _subnet(config: RetinaNetConfig) -> nn.Sequential:
    layers = []
    channels = config.fpn_channels
    for _ in range(config.head_convs):
        conv = nn.Conv2d(channels, config.head_channels, 3, padding=1, bias=config.head_norm == "none")
        nn.init.normal_(conv.weight, std=0.01)
        if config.head_norm == "none":
            zero_bias(conv)
        layers.append(HeadLayer(conv, _head_norm(config)))
        channels = config.head_channels
    return nn.Sequential(*layers)


def _head_norm(config: RetinaNetConfig) -> nn.Module | None:
    """Make the norm of a head: torchvision's v2 for `group`; one for each level for `batch`."""
    match config.head_norm:
        case "group":
            return nn.GroupNorm(min(GROUPS, config.head_channels // 8), config.head_channels)
        case "batch":
            return nn.ModuleList(nn.BatchNorm2d(config.head_channels) for _ in config.level_anchors.levels)
        case "none":
            return None
