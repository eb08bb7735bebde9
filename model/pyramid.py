"""A feature pyramid: levels of one width, made of a backbone's maps.

In:   the backbone's maps C2 or C3 to C5 [N, channels, rows, columns], lowest level first
Out:  P2 or P3 to P5, and up to two levels above, each half as wide and high as the one before (rounded up)

Parameter names are torchvision's (`inner_blocks`, `layer_blocks`, `extra_blocks`). Source: Lin et al. 2017, Feature
Pyramid Networks (§3); the levels above P5: Lin et al. 2017, Focal Loss (§4).
"""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from model.backbones import STAGE_LEVELS


class FeaturePyramid(nn.Module):
    """The levels up to P5, one for each of the backbone's maps, by lateral connections and a top-down path, and those
    above.

    P6 and P7 are strided convolutions (RetinaNet), or P6 is every second cell of P5 (Feature Pyramid Networks §4.1).
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        *,
        top_down: bool,
        extra_from: Literal["c5", "p5", "pool"],
        num_extra: int,
    ) -> None:
        """Make a pyramid. `num_extra`: levels above P5. ValueError: `p6_from` cannot make them."""
        super().__init__()
        most = 1 if extra_from == "pool" else 2
        if not 0 <= num_extra <= most:
            raise ValueError(
                f"a pyramid from {extra_from} ends at P5 to P{STAGE_LEVELS[-1] + most}, not at "
                f"P{STAGE_LEVELS[-1] + num_extra}: give as many base sizes as it has levels"
            )
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(c, channels, 1)) for c in in_channels)
        self.layer_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1)) for _ in in_channels
        )
        for conv in [*self.inner_blocks, *self.layer_blocks]:
            nn.init.kaiming_uniform_(conv[0].weight, a=1)
            zero_bias(conv[0])
        self.extra_blocks: nn.Module = EveryOtherCell()
        if extra_from != "pool":
            self.extra_blocks = P6P7(in_channels[-1] if extra_from == "c5" else channels, channels, num_extra)
        self.top_down = top_down
        self.extra_from = extra_from
        self.num_extra = num_extra

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        laterals = [inner(feature) for inner, feature in zip(self.inner_blocks, features, strict=True)]
        if self.top_down:
            for lower in reversed(range(len(laterals) - 1)):
                size = laterals[lower].shape[-2:]
                laterals[lower] = laterals[lower] + F.interpolate(laterals[lower + 1], size=size, mode="nearest")
        pyramid = [layer(lateral) for layer, lateral in zip(self.layer_blocks, laterals, strict=True)]
        if not self.num_extra:
            return pyramid
        return [*pyramid, *self.extra_blocks(features[-1] if self.extra_from == "c5" else pyramid[-1])]


class P6P7(nn.Sequential):
    """P6 alone, or P6 and P7, by convolutions of stride 2."""

    def __init__(self, in_channels: int, channels: int, num_levels: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(c, channels, 3, stride=2, padding=1) for c in (in_channels, channels)[:num_levels]]
        for name, conv in zip(("p6", "p7"), convs, strict=False):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            zero_bias(conv)
            self.add_module(name, conv)

    def forward(self, feature: Tensor) -> list[Tensor]:
        first, *more = self
        levels = [first(feature)]
        for conv in more:
            levels.append(conv(F.relu(levels[-1])))
        return levels


class EveryOtherCell(nn.Module):
    """P6 as in Feature Pyramid Networks: P5 with stride 2, without weights."""

    def forward(self, feature: Tensor) -> list[Tensor]:
        return [F.max_pool2d(feature, kernel_size=1, stride=2)]


def zero_bias(conv: nn.Conv2d) -> None:
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
