"""From canvases to candidates: normalise, run the network, select the best pairs of each level, decode their boxes.

Evaluation runs this torch module and the export traces it, so a checkpoint and its ONNX file cannot differ. Its outputs
have a fixed size for any input: 1,000 (anchor, class) pairs for each pyramid level, absent ones scored -1. The score
threshold and NMS come after it (`model.suppress`).

Source: Lin et al. 2017 §4.1 "Inference"; the order (top-k, decode, clip) is torchvision's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.anchors import decode_boxes
from model.metadata import Label
from model.retinanet import LevelOutputs, RetinaNet

PRE_NMS_TOP_K = 1000
"""Number of (anchor, class) pairs kept on each level."""
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
"""ImageNet's RGB statistics for values from 0 to 1, as torchvision's backbones use them."""


class Normalise(nn.Module):
    """Module from uint8 canvases [N, H, W, 3] to float [N, 3, H, W], zero beyond `sizes` [N, 2] (height, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", 1 / (255 * torch.tensor(IMAGE_STD)).view(3, 1), persistent=False)
        self.register_buffer("shift", (torch.tensor(IMAGE_MEAN) / torch.tensor(IMAGE_STD)).view(3, 1), persistent=False)

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        batch, height, width, _ = images.shape
        planes = images.permute(0, 3, 1, 2).reshape(batch, 3, height * width)  # else ORT transposes floats, not bytes
        rows = torch.arange(height, device=images.device) < sizes[:, :1]
        columns = torch.arange(width, device=images.device) < sizes[:, 1:]
        valid = (rows[:, :, None] & columns[:, None, :]).reshape(batch, 1, height * width)
        pixels = (planes.to(self.scale.dtype) * self.scale - self.shift) * valid
        return pixels.reshape(batch, 3, height, width)


class CandidateDetector(nn.Module):
    """A RetinaNet with all steps from canvases to candidates."""

    def __init__(self, network: RetinaNet, labels: Sequence[Label]) -> None:
        super().__init__()
        if len(labels) != network.num_classes:
            raise ValueError(f"{len(labels)} labels for a network of {network.num_classes} classes")
        self.class_ids: Tensor
        self.normalise = Normalise()
        self.network = network
        self.register_buffer("class_ids", torch.tensor([label.class_id for label in labels]), persistent=False)

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turn images uint8 [N, H, W, 3] RGB and sizes int64 [N, 2] (valid height, width) into boxes, scores,
        labels."""
        return self.select(self.outputs(images, sizes), sizes, canvas=(images.shape[1], images.shape[2]))

    def outputs(self, images: Tensor, sizes: Tensor) -> LevelOutputs:
        """Run the network on canvases, as `forward` takes them."""
        outputs: LevelOutputs = self.network(self.normalise(images, sizes).to(self.network.dtype))
        return outputs

    def select(self, outputs: LevelOutputs, sizes: Tensor, canvas: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the candidates of a canvas (height, width), in its pixels.

        returns  boxes float32 [N, candidates, 4] xyxy, clipped to each image's size; scores float32 [N, candidates];
                 labels int64 [N, candidates], category ids; candidates = 1,000 x levels
        """
        anchors = self.network.anchors(canvas, outputs.grids)
        num_classes = self.network.num_classes
        levels = [
            _select_level(cls_logits, bbox_regression, level_anchors, num_classes)
            for cls_logits, bbox_regression, level_anchors in zip(
                outputs.cls_logits, outputs.bbox_regression, anchors, strict=True
            )
        ]
        boxes, logits, columns = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        scores = torch.where(logits == -torch.inf, -1.0, torch.sigmoid(logits))
        return _clip(boxes, sizes), scores, self.class_ids[columns]


def _select_level(
    cls_logits: Tensor, bbox_regression: Tensor, anchors: Tensor, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the top 1,000 (anchor, class) pairs of one level: boxes [N, 1000, 4], logits [N, 1000], columns [N, 1000].

    First the 1,000 anchors with the best maxima over classes are selected, then the best pairs on them. The result is
    exact, because those anchors hold the top pairs, and K times fewer values are sorted. -inf fills a level with fewer.
    """
    batch, _, rows, columns = cls_logits.shape
    cells = rows * columns
    per_cell = bbox_regression.shape[1] // 4
    by_anchor = cls_logits.reshape(batch, per_cell, num_classes, cells)
    best = by_anchor.amax(dim=2).transpose(1, 2).reshape(batch, cells * per_cell)
    filling = best.new_full((1, PRE_NMS_TOP_K), -torch.inf).expand(batch, -1)
    best, anchor = torch.cat([best, filling], dim=1).topk(PRE_NMS_TOP_K, dim=1)
    anchor = anchor.clamp(max=cells * per_cell - 1)
    cell, in_cell = anchor // per_cell, anchor % per_cell

    classes = torch.arange(num_classes, device=anchor.device)
    position = (in_cell[:, :, None] * num_classes + classes) * cells + cell[:, :, None]
    logits = cls_logits.reshape(batch, -1).gather(1, position.reshape(batch, -1))
    logits = logits.masked_fill((best == -torch.inf).repeat_interleave(num_classes, dim=1), -torch.inf)
    logits, pair = logits.topk(PRE_NMS_TOP_K, dim=1)
    chosen = pair // num_classes
    anchor, cell, in_cell = (index.gather(1, chosen) for index in (anchor, cell, in_cell))

    sides = torch.arange(4, device=anchor.device)
    position = (in_cell[:, :, None] * 4 + sides) * cells + cell[:, :, None]
    deltas = bbox_regression.reshape(batch, -1).gather(1, position.reshape(batch, -1)).reshape(batch, -1, 4)
    return decode_boxes(deltas.float(), anchors[anchor]), logits.float(), pair % num_classes


def _clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    height, width = sizes[:, None, :1].to(boxes.dtype), sizes[:, None, 1:].to(boxes.dtype)
    limits = torch.cat([width, height, width, height], dim=-1)
    return torch.minimum(boxes.clamp(min=0), limits)
