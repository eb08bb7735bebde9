"""Which anchor is responsible for which object.

An anchor belongs to the object that it overlaps most: positive from `fg_iou_threshold` on, background below
`bg_iou_threshold`, ignored between. Each object also keeps the anchors that overlap it best, however little, so
that none is left without. Source: Lin et al. 2017 (Focal Loss) §4 "Anchors"; the best-anchor rule as in Faster
R-CNN (Ren et al. 2015, §3.1.2).
"""

import torch
from torch import Tensor
from torchvision.ops import box_iou

BACKGROUND = -1
IGNORED = -2


def match(
    anchors: Tensor, boxes: Tensor, ignored: Tensor, *, fg_iou_threshold: float, bg_iou_threshold: float
) -> Tensor:
    """The object of each anchor: its index, BACKGROUND or IGNORED.

    anchors  [A, 4]  xyxy
    boxes    [M, 4]  xyxy, objects
    ignored  [R, 4]  xyxy, regions: a background anchor that lies by half or more in one is ignored
    returns  int64 [A]
    """
    matches = torch.full((len(anchors),), BACKGROUND, device=anchors.device)
    if len(ignored):
        matches[_share_inside(anchors, ignored).amax(dim=1) >= 0.5] = IGNORED
    if not len(boxes) or not len(anchors):
        return matches
    iou = box_iou(boxes, anchors)
    best_iou, best_box = iou.max(dim=0)
    matches[(best_iou >= bg_iou_threshold) & (best_iou < fg_iou_threshold)] = IGNORED
    positive = best_iou >= fg_iou_threshold
    best_of_box = iou.amax(dim=1, keepdim=True)
    positive |= ((iou == best_of_box) & (best_of_box > 0)).any(dim=0)
    return torch.where(positive, best_box, matches)


def _share_inside(anchors: Tensor, regions: Tensor) -> Tensor:
    """[A, R]: the share of each anchor's area that lies in each region."""
    low = torch.maximum(anchors[:, None, :2], regions[None, :, :2])
    high = torch.minimum(anchors[:, None, 2:], regions[None, :, 2:])
    sizes = anchors[:, 2:] - anchors[:, :2]
    return (high - low).clamp(min=0).prod(dim=-1) / sizes.prod(dim=-1)[:, None]
