"""Backbones: torchvision's ResNets, ResNeXts and MobileNetV3s, cut after the last classification-free stage.

A backbone maps normalised images [N, 3, H, W] to C3, C4 and C5 (strides 8, 16, 32), or from another lowest level up to
C5. Its parameters keep torchvision's names. Norm layers are trained (`batch`), or are fixed affine maps (`frozen`, for
fine-tuning with few images per step), which the convolutions before them compute.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torchvision import models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.mobilenetv3 import InvertedResidual
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d

NormKind = Literal["batch", "frozen"]
NormLayer = Callable[..., nn.Module]

RESNETS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": models.resnet18,
    "resnet34": models.resnet34,
    "resnet50": models.resnet50,
    "resnet101": models.resnet101,
    "resnet152": models.resnet152,
    "resnext50_32x4d": models.resnext50_32x4d,
    "resnext101_32x8d": models.resnext101_32x8d,
    "resnext101_64x4d": models.resnext101_64x4d,
}
MOBILENETS: dict[str, Callable[..., nn.Module]] = {
    "mobilenet_v3_small": models.mobilenet_v3_small,
    "mobilenet_v3_large": models.mobilenet_v3_large,
}
NARROW_RESNETS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
"""Blocks in each stage of the ResNets of basic blocks, which can be narrowed."""
BACKBONES = (*RESNETS, *MOBILENETS)
STAGE_LEVELS = range(2, 6)
"""C2 to C5: the map of level n has cells 2**n pixels apart."""


@dataclass(frozen=True)
class Backbone:
    body: nn.Module
    """Module from images to {"0": C3, "1": C4, "2": C5}, or from another lowest level."""
    channels: tuple[int, ...]


def build_backbone(
    name: str,
    *,
    width: float = 1.0,
    norm: NormKind = "batch",
    norm_epsilon: float = 1e-5,
    pretrained: bool = False,
    lowest_level: int = 3,
) -> Backbone:
    """Build one of BACKBONES.

    width       factor on every stage's channels; other than 1 only for resnet18, resnet34 and MobileNetV3
    pretrained  start from torchvision's ImageNet weights, which are downloaded; only at width 1
    lowest_level  the first level wanted, 2 to 5 (C2 to C5)
    ValueError: an unknown name, or a width or level that the architecture cannot take.
    """
    if lowest_level not in STAGE_LEVELS:
        raise ValueError(f"a backbone has levels 2 to 5; the lowest one wanted is {lowest_level}")
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}; there are {', '.join(BACKBONES)}")
    if width != 1 and pretrained:
        raise ValueError("ImageNet weights exist only for width 1")
    network = _network(name, width, _norm_layer(norm, norm_epsilon), "DEFAULT" if pretrained else None)
    _join_frozen_norms(network)
    return _mobilenet(network, lowest_level) if name in MOBILENETS else _resnet(network, lowest_level)


def _network(name: str, width: float, layer: NormLayer, weights: str | None) -> nn.Module:
    if name in MOBILENETS:
        return MOBILENETS[name](weights=weights, norm_layer=layer, width_mult=width)
    if width == 1:
        return RESNETS[name](weights=weights, norm_layer=layer)
    if name not in NARROW_RESNETS:
        raise ValueError(f"{name} has no narrow form; those that do: {', '.join([*NARROW_RESNETS, *MOBILENETS])}")
    channels = [_multiple_of_8(64 * 2**stage * width) for stage in range(4)]
    return _narrow_resnet(NARROW_RESNETS[name], channels, layer)


def _norm_layer(norm: NormKind, epsilon: float) -> NormLayer:
    return partial(nn.BatchNorm2d if norm == "batch" else FrozenNorm, eps=epsilon)


class FrozenNorm(FrozenBatchNorm2d):  # type: ignore[misc]
    """A fixed affine map of the channels, which the NormedConv2d before it computes."""

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return scale and shift, [channels] each."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, maps: Tensor) -> Tensor:
        return maps


class NormedConv2d(nn.Conv2d):
    """A convolution that also computes the frozen norm after it: scaling the weights is far less work than scaling the
    maps, in training and in inference."""

    def __init__(self, conv: nn.Conv2d, norm: FrozenNorm) -> None:
        """Takes over the weights of `conv`."""
        super().__init__(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,  # type: ignore[arg-type]
            conv.groups, bias=False, device="meta",
        )  # fmt: skip
        self.weight = conv.weight
        self._norm = (norm,)  # its place in the network, and so its name, is torchvision's

    def forward(self, maps: Tensor) -> Tensor:
        normed: Tensor = self._conv_forward(maps, *self.weight_and_bias())
        return normed

    def weight_and_bias(self) -> tuple[Tensor, Tensor]:
        """Return the weight and bias of the equal plain convolution."""
        scale, shift = self._norm[0].affine()
        weight: Tensor = self.weight * scale.view(-1, 1, 1, 1)
        return weight, shift


def _join_frozen_norms(network: nn.Module) -> None:
    for parent in list(network.modules()):
        for (name, conv), (_, norm) in pairwise(list(parent.named_children())):
            if isinstance(norm, FrozenNorm):
                assert isinstance(conv, nn.Conv2d) and conv.bias is None
                setattr(parent, name, NormedConv2d(conv, norm))


def _multiple_of_8(channels: float) -> int:
    return max(8, int(channels + 4) // 8 * 8)


def _resnet(network: nn.Module, lowest_level: int) -> Backbone:
    stages = [f"layer{level - 1}" for level in STAGE_LEVELS if level >= lowest_level]
    channels = tuple(int(_last_convolution(network.get_submodule(stage)).out_channels) for stage in stages)
    return Backbone(IntermediateLayerGetter(network, _numbered(stages)), channels)


def _last_convolution(module: nn.Module) -> nn.Conv2d:
    last_block = list(module.children())[-1]
    return [layer for layer in last_block.children() if isinstance(layer, nn.Conv2d)][-1]


def _mobilenet(network: nn.Module, lowest_level: int) -> Backbone:
    """Build a MobileNetV3, whose stages end before each block that halves the resolution."""
    features = list(network.get_submodule("features").children())
    halving = [index for index, block in enumerate(features) if isinstance(block, InvertedResidual) and block._is_cn]
    ends = [*(block - 1 for block in halving[-3:]), len(features) - 1][lowest_level - STAGE_LEVELS[0] :]
    channels = tuple(int(features[end].out_channels) for end in ends)  # type: ignore[arg-type]
    body = IntermediateLayerGetter(network.get_submodule("features"), _numbered([str(end) for end in ends]))
    return Backbone(body, channels)


def _numbered(stages: Sequence[str]) -> dict[str, str]:
    return {stage: str(index) for index, stage in enumerate(stages)}


def _narrow_resnet(blocks: Sequence[int], channels: Sequence[int], norm: NormLayer) -> nn.Module:
    """Build a ResNet of basic blocks with free stage widths, torchvision's names and its initialisation (He et al.
    2015)."""
    stages = OrderedDict(
        conv1=nn.Conv2d(3, channels[0], 7, stride=2, padding=3, bias=False),
        bn1=norm(channels[0]),
        relu=nn.ReLU(inplace=True),
        maxpool=nn.MaxPool2d(3, stride=2, padding=1),
    )
    before = channels[0]
    for stage, (count, out) in enumerate(zip(blocks, channels, strict=True), start=1):
        stages[f"layer{stage}"] = _basic_stage(before, out, count, stride=1 if stage == 1 else 2, norm=norm)
        before = out
    network = nn.Sequential(stages)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def _basic_stage(before: int, out: int, count: int, *, stride: int, norm: NormLayer) -> nn.Sequential:
    shortcut = None
    if stride != 1 or before != out:
        shortcut = nn.Sequential(nn.Conv2d(before, out, 1, stride=stride, bias=False), norm(out))
    first = BasicBlock(before, out, stride, shortcut, norm_layer=norm)
    return nn.Sequential(first, *(BasicBlock(out, out, norm_layer=norm) for _ in range(count - 1)))
