"""The network: shapes, initialisation, and torchvision's names."""

import math

import pytest
import torch
import torchvision

from model.anchors import AnchorConfig
from model.retinanet import RetinaNet, RetinaNetConfig, flatten_maps, prior_bias
from tests.networks import TINY

TORCHVISION = {
    "": RetinaNetConfig(backbone_norm="batch", p6_from="p5", anchors=AnchorConfig(stride="torchvision")),
    "_v2": RetinaNetConfig(backbone_norm="batch", head_norm="group", anchors=AnchorConfig(stride="torchvision")),
}


@pytest.mark.parametrize(("version", "parameters"), [("", 34_068_119), ("_v2", 38_198_935)])
def test_torchvisions_weights_load_strictly_and_give_its_outputs(version: str, parameters: int) -> None:
    build = getattr(torchvision.models.detection, f"retinanet_resnet50_fpn{version}")
    theirs = build(weights=None, weights_backbone=None, num_classes=91).eval()
    ours = RetinaNet(TORCHVISION[version], 91).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    images = torch.rand(1, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.head(list(theirs.backbone(images).values()))
        found = ours.flatten(ours(images))
    assert torch.equal(found.cls_logits, expected["cls_logits"])
    assert torch.equal(found.bbox_regression, expected["bbox_regression"])


def test_every_anchor_starts_with_the_prior_probability() -> None:
    assert prior_bias(0.01) == pytest.approx(-math.log(99))
    bias = RetinaNet(TINY, 5).head.classification_head.cls_logits.bias
    assert torch.sigmoid(bias).unique().tolist() == pytest.approx([0.01])


def test_a_canvas_of_32_by_64_has_five_levels_down_to_one_cell() -> None:
    outputs = RetinaNet(TINY, 5).eval()(torch.zeros(2, 3, 32, 64))
    assert outputs.grids == [(4, 8), (2, 4), (1, 2), (1, 1), (1, 1)]
    assert [maps.shape[:2] for maps in outputs.cls_logits] == [(2, 9 * 5)] * 5


def test_flattening_keeps_the_order_of_the_anchors() -> None:
    per_cell, classes, rows, columns = 2, 3, 4, 5
    maps = torch.zeros(1, per_cell * classes, rows, columns)
    maps[0, 1 * classes + 2, 3, 4] = 1  # anchor 1, class 2, at row 3, column 4
    [[flat]] = flatten_maps([maps], classes).unsqueeze(0)
    assert flat.nonzero().tolist() == [[(3 * columns + 4) * per_cell + 1, 2]]


def test_the_pyramid_takes_its_top_levels_from_where_it_is_told() -> None:
    c5 = RetinaNet(RetinaNetConfig(backbone="resnet18", p6_from="c5"), 1).backbone.fpn.extra_blocks.p6
    p5 = RetinaNet(RetinaNetConfig(backbone="resnet18", p6_from="p5"), 1).backbone.fpn.extra_blocks.p6
    assert (c5.in_channels, p5.in_channels) == (512, 256)


def test_a_detector_without_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one class"):
        RetinaNet(TINY, 0)
