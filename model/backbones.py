"""Backbones: torchvision's ResNets, ResNeXts and MobileNetV3s, cut after the last classification-free stage.

A backbone maps normalised images [N, 3, H, W] to C3, C4 and C5 (strides 8, 16, 32); its parameters keep
torchvision's names. Norm layers are trained (`batch`) or fixed affine maps (`frozen`, for fine-tuning with few
images per step).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn
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
"""Those of basic blocks, which can be narrowed, with the number of blocks in each stage."""
BACKBONES = (*RESNETS, *MOBILENETS)


@dataclass(frozen=True)
class Backbone:
    body: nn.Module
    """Images -> {"0": C3, "1": C4, "2": C5}."""
    channels: tuple[int, int, int]


def build_backbone(
    name: str, *, width: float = 1.0, norm: NormKind = "batch", norm_epsilon: float = 1e-5, pretrained: bool = False
) -> Backbone:
    """Build one of BACKBONES.

    width       factor on every stage's channels; other than 1 only for resnet18, resnet34 and MobileNetV3
    pretrained  start from torchvision's ImageNet weights, which are downloaded; only at width 1
    ValueError: an unknown name, or a width that the architecture cannot take.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}; there are {', '.join(BACKBONES)}")
    if width != 1 and pretrained:
        raise ValueError("ImageNet weights exist only for width 1")
    layer = _norm_layer(norm, norm_epsilon)
    weights = "DEFAULT" if pretrained else None
    if name in MOBILENETS:
        return _mobilenet(MOBILENETS[name](weights=weights, norm_layer=layer, width_mult=width))
    if width == 1:
        return _resnet(RESNETS[name](weights=weights, norm_layer=layer))
    if name not in NARROW_RESNETS:
        raise ValueError(f"{name} has no narrow form; those that do: {', '.join([*NARROW_RESNETS, *MOBILENETS])}")
    channels = [_multiple_of_8(64 * 2**stage * width) for stage in range(4)]
    return _resnet(_narrow_resnet(NARROW_RESNETS[name], channels, layer))


def _norm_layer(norm: NormKind, epsilon: float) -> NormLayer:
    return partial(nn.BatchNorm2d if norm == "batch" else FrozenBatchNorm2d, eps=epsilon)


def _multiple_of_8(channels: float) -> int:
    return max(8, int(channels + 4) // 8 * 8)


def _resnet(network: nn.Module) -> Backbone:
    stages = [network.get_submodule(name) for name in ("layer2", "layer3", "layer4")]
    c3, c4, c5 = (int(_last_convolution(stage).out_channels) for stage in stages)
    return Backbone(IntermediateLayerGetter(network, {"layer2": "0", "layer3": "1", "layer4": "2"}), (c3, c4, c5))


def _last_convolution(module: nn.Module) -> nn.Conv2d:
    last_block = list(module.children())[-1]
    return [layer for layer in last_block.children() if isinstance(layer, nn.Conv2d)][-1]


def _mobilenet(network: nn.Module) -> Backbone:
    """A stage ends before the next block that halves the resolution."""
    features = list(network.get_submodule("features").children())
    halving = [index for index, block in enumerate(features) if isinstance(block, InvertedResidual) and block._is_cn]
    ends = [halving[-2] - 1, halving[-1] - 1, len(features) - 1]
    c3, c4, c5 = (int(features[end].out_channels) for end in ends)  # type: ignore[arg-type]
    body = IntermediateLayerGetter(network.get_submodule("features"), {str(end): str(i) for i, end in enumerate(ends)})
    return Backbone(body, (c3, c4, c5))


def _narrow_resnet(blocks: Sequence[int], channels: Sequence[int], norm: NormLayer) -> nn.Module:
    """A ResNet of basic blocks with free stage widths, on torchvision's names and initialisation (He et al. 2015)."""
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
