"""Anchors: the reference boxes of every cell of every pyramid level, and the coding of boxes relative to them.

Frame: xyxy float32 in canvas pixels, cell centres at multiples of the stride (offset 0), as in torchvision's
AnchorGenerator.
Order: level, row, column, then the cell's anchors by aspect ratio and, within it, by scale, as in the heads' channels.

Sources: Lin et al. 2017 (Focal Loss) §4 "Anchors"; Girshick 2015 (Fast R-CNN) eq. 1-4 for the coding.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model.metadata import AnchorConfig

__all__ = ["MAX_LOG_RATIO", "AnchorConfig", "Anchors", "cell_anchors", "decode_boxes", "encode_boxes", "grid_anchors"]

MAX_LOG_RATIO = math.log(1000 / 16)
"""Bound of dw and dh, so that an untrained network cannot overflow exp()."""


def cell_anchors(base_size: float, scales: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """Make the anchors of one cell, centred on the origin: [ratios * scales, 4], whole pixels rounded as in
    torchvision."""
    sizes = torch.tensor([int(base_size * scale) for scale in scales], dtype=torch.float32)
    height_factors = torch.sqrt(torch.tensor(aspect_ratios, dtype=torch.float32))
    widths = (1 / height_factors[:, None] * sizes).flatten()
    heights = (height_factors[:, None] * sizes).flatten()
    return (torch.stack([-widths, -heights, widths, heights], dim=1) / 2).round()


def grid_anchors(cell: Tensor, grid: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Repeat one cell's anchors [A, 4] over a grid of (rows, columns) with stride (y, x): [rows * columns * A, 4]."""
    rows = torch.arange(grid[0], dtype=torch.float32, device=cell.device) * stride[0]
    columns = torch.arange(grid[1], dtype=torch.float32, device=cell.device) * stride[1]
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    centres = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
    return (centres + cell).reshape(-1, 4)


class Anchors(torch.nn.Module):
    """The anchors of every level for a canvas; holds no parameters and no state-dict entries."""

    def __init__(self, config: AnchorConfig) -> None:
        super().__init__()
        self.config = config
        self.cells: Tensor
        cells = [cell_anchors(size, config.scales, config.aspect_ratios) for size in config.base_sizes]
        self.register_buffer("cells", torch.stack(cells), persistent=False)

    def forward(self, canvas: tuple[int, int], grids: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Make the anchors [cells * A, 4] of each level, from the canvas (height, width) and the grids (rows,
        columns)."""
        return [
            grid_anchors(cell, grid, self._stride(level, canvas, grid))
            for cell, level, grid in zip(self.cells, self.config.levels, grids, strict=True)
        ]

    def _stride(self, level: int, canvas: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
        if self.config.stride == "torchvision":
            return canvas[0] // grid[0], canvas[1] // grid[1]
        return 2**level, 2**level


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Compute the regression deltas that turn anchors into boxes; the inverse of `decode_boxes`.

    boxes    [..., 4]  xyxy, canvas pixels, width and height above 0
    anchors  [..., 4]  xyxy, canvas pixels
    returns  [..., 4]  (dx, dy, dw, dh), unitless
    """
    anchor_sizes = anchors[..., 2:] - anchors[..., :2]
    anchor_centres = anchors[..., :2] + anchor_sizes / 2
    sizes = boxes[..., 2:] - boxes[..., :2]
    centres = boxes[..., :2] + sizes / 2
    return torch.cat([(centres - anchor_centres) / anchor_sizes, torch.log(sizes / anchor_sizes)], dim=-1)


def decode_boxes(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Apply regression deltas to anchors.

    deltas   [..., 4]  (dx, dy, dw, dh), unitless
    anchors  [..., 4]  xyxy, canvas pixels
    returns  [..., 4]  xyxy, canvas pixels, not clipped

    dw and dh are limited to log(1000 / 16). Fast R-CNN parametrisation (Girshick 2015, eq. 1-4).
    """
    anchor_sizes = anchors[..., 2:] - anchors[..., :2]
    anchor_centres = anchors[..., :2] + anchor_sizes / 2
    centres = deltas[..., :2] * anchor_sizes + anchor_centres
    half_sizes = torch.exp(deltas[..., 2:].clamp(max=MAX_LOG_RATIO)) * anchor_sizes / 2
    return torch.cat([centres - half_sizes, centres + half_sizes], dim=-1)
