"""The assignment of anchors to objects.

An anchor is matched to the object that it overlaps most: it is positive from `fg_iou_threshold`, background below
`bg_iou_threshold`, and ignored between. Each object also keeps the anchors that overlap it best, however little, so
that every object has one. Source: Lin et al. 2017 (Focal Loss) §4 "Anchors"; the best-anchor rule as in Faster R-CNN
(Ren et al. 2015, §3.1.2).

The region proposal network (Ren et al. 2015, §3.1.3) also ignores anchors that cross the picture's border, and samples
a few of the others, half of them positive. Here both rules make anchors IGNORED, so the losses need no rule for them.
"""

import torch
from torch import Tensor
from torchvision.ops import box_iou

PAIRS = 2**23
"""Most pairs of anchor and object (or region) that are compared at once, of some 30 bytes each."""
BACKGROUND = -1
IGNORED = -2


def match(
    anchors: Tensor, boxes: Tensor, ignored: Tensor, *, fg_iou_threshold: float, bg_iou_threshold: float
) -> Tensor:
    """Return each anchor's object: its index, BACKGROUND or IGNORED.

    anchors  [A, 4]  xyxy
    boxes    [M, 4]  xyxy, objects
    ignored  [R, 4]  xyxy, regions: a background anchor that lies by half or more in one is ignored
    returns  int64 [A]
    """
    matches = torch.full((len(anchors),), BACKGROUND, device=anchors.device)
    some = max(1, PAIRS // max(1, len(anchors)))
    for start in range(0, len(ignored), some):
        matches[_share_inside(anchors, ignored[start : start + some]).amax(dim=1) >= 0.5] = IGNORED
    if not len(boxes) or not len(anchors):
        return matches
    best_iou, best_box = anchors.new_full((len(anchors),), -1), torch.zeros_like(matches)
    is_best = torch.zeros_like(matches, dtype=torch.bool)
    for start in range(0, len(boxes), some):
        iou = box_iou(boxes[start : start + some], anchors)
        highest, box = iou.max(dim=0)
        better = highest > best_iou
        best_iou, best_box = torch.where(better, highest, best_iou), torch.where(better, box + start, best_box)
        best_of_box = iou.amax(dim=1, keepdim=True)
        is_best |= ((iou == best_of_box) & (best_of_box > 0)).any(dim=0)
    matches[(best_iou >= bg_iou_threshold) & (best_iou < fg_iou_threshold)] = IGNORED
    return torch.where((best_iou >= fg_iou_threshold) | is_best, best_box, matches)


def match_inside(
    anchors: Tensor,
    boxes: Tensor,
    ignored: Tensor,
    size: tuple[int, int],
    *,
    fg_iou_threshold: float,
    bg_iou_threshold: float,
) -> Tensor:
    """Match the anchors that lie inside a picture of `size` (height, width) at the canvas's top left corner. The others
    are IGNORED, and are no object's best."""
    height, width = size
    inside = (anchors[:, :2] >= 0).all(dim=1) & (anchors[:, 2] <= width) & (anchors[:, 3] <= height)
    matches = torch.full((len(anchors),), IGNORED, device=anchors.device)
    matches[inside] = match(
        anchors[inside], boxes, ignored, fg_iou_threshold=fg_iou_threshold, bg_iou_threshold=bg_iou_threshold
    )
    return matches


def draw_anchors(matches: Tensor, num_anchors: int, max_positives: int, generator: torch.Generator) -> Tensor:
    """Sample `num_anchors` anchors, at most `max_positives` of them positive and the rest background, or fewer if there
    are not so many. All others become IGNORED.

    matches    int64 [A], as `match` returns them
    generator  on the CPU for any device of the matches, so that its seed alone determines the sample
    """
    positives = (matches >= 0).nonzero().squeeze(1)
    background = (matches == BACKGROUND).nonzero().squeeze(1)
    positives = _draw(positives, max_positives, generator)
    background = _draw(background, num_anchors - len(positives), generator)
    drawn = torch.cat([positives, background])
    kept = torch.full_like(matches, IGNORED)
    kept[drawn] = matches[drawn]
    return kept


def _draw(indices: Tensor, most: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(indices), generator=generator)[:most]
    return indices[order.to(indices.device)]


def _share_inside(anchors: Tensor, regions: Tensor) -> Tensor:
    """Compute [A, R], the share of each anchor's area that lies in each region."""
    low = torch.maximum(anchors[:, None, :2], regions[None, :, :2])
    high = torch.minimum(anchors[:, None, 2:], regions[None, :, 2:])
    sizes = anchors[:, 2:] - anchors[:, :2]
    return (high - low).clamp(min=0).prod(dim=-1) / sizes.prod(dim=-1)[:, None]
