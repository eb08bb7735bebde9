"""A network as plain convolutions: the norms that only scale and shift, folded into the weights before them.

CandidateDetector --fold_norms--> CandidateDetector that answers the same, what an export traces
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model.backbones import NormedConv2d
from model.candidates import CandidateDetector
from model.retinanet import HeadLayer


class LevelConvs(nn.Sequential):
    """A HeadLayer with batch norms as a convolution for each level and a ReLU: the same answers."""

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        convs, relu = self
        return [relu(conv(level)) for conv, level in zip(convs, levels, strict=True)]  # type: ignore[call-overload]


def fold_norms(detector: CandidateDetector) -> CandidateDetector:
    """A copy whose convolutions hold the backbone's frozen norms and the head's batch norms, the head's one convolution
    for each level, equal to float noise.

    The exporter folds a norm only into a convolution that nothing else uses. Left as they are, the norms of shared
    convolutions would be a multiplication and an addition over every map, and keep int8 from one kernel for
    convolution and ReLU. It costs the head's weights once for each level.
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
    """Does the same, with weights and bias of its own."""
    weight, bias = conv.weight_and_bias()
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups  # type: ignore[arg-type]
    )  # fmt: skip
    plain.weight, plain.bias = nn.Parameter(weight), nn.Parameter(bias)
    return plain
