"""A network as plain convolutions: norms that only scale and shift are folded into the weights before them.

CandidateDetector --fold_norms--> CandidateDetector with the same answers, which the export traces
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model.backbones import NormedConv2d
from model.candidates import CandidateDetector
from model.retinanet import HeadLayer


class LevelConvs(nn.Sequential):
    """A HeadLayer with batch norms, as one convolution for each level and a ReLU; its answers are the same."""

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        convs, relu = self
        return [relu(conv(level)) for conv, level in zip(convs, levels, strict=True)]  # type: ignore[call-overload]


def fold_norms(detector: CandidateDetector) -> CandidateDetector:
    """Copy the detector with the backbone's frozen norms and the head's batch norms folded into convolutions, which the
    head has for each level. The answers are equal up to float noise.

    The exporter folds a norm only into a convolution that nothing else uses. The norms of shared convolutions would
    remain a multiplication and an addition over every map, and int8 could not use one kernel for convolution and ReLU.
    The price is one copy of the head's weights for each level.
    """
    detector = copy.deepcopy(detector)
    for parent in list(detector.modules()):
        for name, conv in list(parent.named_children()):
            if isinstance(conv, NormedConv2d):
                setattr(parent, name, plain_conv(conv))
    heads = detector.network.head
    for subnet in (heads.classification_head.conv, heads.regression_head.conv):
        for position, layer in enumerate(subnet):
            assert isinstance(layer, HeadLayer)
            if isinstance(layer.norm, nn.ModuleList):
                fused = [fuse_conv_bn_eval(layer.conv, norm) for norm in layer.norm]  # type: ignore[arg-type, type-var]
                subnet[position] = LevelConvs(nn.ModuleList(fused), layer.relu)
    return detector


@torch.no_grad()
def plain_conv(conv: NormedConv2d) -> nn.Conv2d:
    """Return the equal plain convolution, with weight and bias of its own."""
    weight, bias = conv.weight_and_bias()
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups  # type: ignore[arg-type]
    )  # fmt: skip
    plain.weight, plain.bias = nn.Parameter(weight), nn.Parameter(bias)
    return plain
