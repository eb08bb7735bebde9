"""The network: shapes, initialisation, and torchvision's names."""

import math
from dataclasses import replace

import pytest
import torch
import torchvision

from model.anchors import AnchorConfig
from model.retinanet import RetinaNet, RetinaNetConfig, flatten_maps, prior_bias
from tests.support.networks import TINY

RPN = replace(TINY, head="shared", p6_from="pool", anchors=AnchorConfig(scales=(1,), lowest_level=2))
"""The region proposal network's shape, small."""

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


def test_a_batch_norm_head_shares_convolutions_but_keeps_each_levels_statistics() -> None:
    network = RetinaNet(replace(TINY, head_norm="batch"), 5).train()
    network(torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)))
    layer = network.head.classification_head.conv[0]
    assert isinstance(layer[0], torch.nn.Conv2d)
    assert layer[0].bias is None
    means = torch.stack([norm.running_mean for norm in layer[1]])
    assert len(means) == 5
    assert len(means.unique(dim=0)) == 5


def test_a_pyramid_of_the_top_level_alone_has_the_anchors_of_every_level_there() -> None:
    network = RetinaNet(replace(TINY, pyramid="top"), 5).eval()
    outputs = network(torch.zeros(1, 3, 64, 96))
    assert outputs.grids == [(2, 3)]
    [found] = network.anchors((64, 96), outputs.grids)
    every_level = RetinaNet(TINY, 5).anchors((64, 96), [(1, 1)] * 5)
    assert sorted(found[:45].tolist()) == sorted(torch.cat(every_level).tolist())
    assert "top level(16, P5-P5" in network.config.describe()


def test_without_the_top_down_path_a_level_knows_nothing_of_those_above_it() -> None:
    """Only P3 reads the lowest lateral layer; with the path it reads the highest one, too."""
    readers = {}
    for pyramid in ("fpn", "rough"):
        network = RetinaNet(replace(TINY, pyramid=pyramid), 5).eval()
        network.backbone(torch.rand(1, 3, 64, 96))[0].sum().backward()
        grads = [block[0].weight.grad for block in network.backbone.fpn.inner_blocks]
        readers[pyramid] = [grad is not None and bool(grad.any()) for grad in grads]
    assert readers == {"fpn": [True, True, True], "rough": [True, False, False]}


def test_the_rough_pyramid_has_the_levels_and_parameters_of_the_feature_pyramid() -> None:
    rough, fpn = (RetinaNet(replace(TINY, pyramid=pyramid), 5) for pyramid in ("rough", "fpn"))
    rough.load_state_dict(fpn.state_dict(), strict=True)
    assert rough.eval()(torch.zeros(1, 3, 32, 64)).grids == [(4, 8), (2, 4), (1, 2), (1, 1), (1, 1)]


def test_the_proposal_network_looks_at_p2_to_p6_through_one_shared_convolution() -> None:
    network = RetinaNet(RPN, 1).eval()
    outputs = network(torch.zeros(1, 3, 64, 96))
    assert outputs.grids == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    assert [maps.shape[1] for maps in outputs.cls_logits] == [3] * 5
    kernels = {name: tuple(p.shape[2:]) for name, p in network.head.named_parameters() if name.endswith("weight")}
    assert kernels == {
        "conv.0.0.weight": (3, 3),
        "classification_head.cls_logits.weight": (1, 1),
        "regression_head.bbox_reg.weight": (1, 1),
    }


def test_p6_of_the_proposal_network_is_every_second_cell_of_p5() -> None:
    *_, p5, p6 = RetinaNet(RPN, 1).backbone(torch.rand(1, 3, 96, 160))
    assert torch.equal(p6, p5[:, :, ::2, ::2])


@pytest.mark.parametrize(
    ("sizes", "p6_from", "says"),
    [((8.0, 16.0), "c5", "not at P4"), ((8.0,) * 6, "c5", "P5 to P7, not at P8"), ((8.0,) * 5, "pool", "not at P7")],
)
def test_a_pyramid_that_cannot_be_built_is_refused(sizes: tuple[float, ...], p6_from: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RetinaNet(replace(TINY, p6_from=p6_from, anchors=AnchorConfig(base_sizes=sizes)), 1)
