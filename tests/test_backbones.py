"""Every backbone trains; one of each kind of block is exported and detects. Depth and width alone change no operator,
so the deeper relatives of those are not exported here: the export takes longer than all else."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.backbones import BACKBONES, build_backbone
from model.detector import Detector
from model.retinanet import RetinaNet, RetinaNetConfig
from tests.networks import SMALL_CANVAS, TINY, draw, missing, tiny_checkpoint
from training.checkpoint import build_detector
from training.config import LossConfig
from training.evaluate import Predictor, torch_run
from training.export import export
from training.losses import retinanet_losses
from training.transforms import TensorTarget

NARROW = (("resnet18", 0.25), ("resnet34", 0.5), ("mobilenet_v3_small", 0.5), ("mobilenet_v3_large", 0.5))
ALL = [(name, 1.0) for name in BACKBONES] + list(NARROW)
ONE_OF_EACH_BLOCK = [("resnext50_32x4d", 1.0), ("mobilenet_v3_small", 1.0)]
"""Bottleneck with grouped convolutions; inverted residual with squeeze and excitation. The plain bottleneck is exported
in test_parity.py, the basic block in test_hard_graphs.py."""


def config(name: str, width: float) -> RetinaNetConfig:
    return replace(TINY, backbone=name, backbone_width=width)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width"), ALL)
def test_a_step_of_training_moves_every_weight(name: str, width: float) -> None:
    torch.manual_seed(0)
    network = RetinaNet(config(name, width), 3).train()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01)
    images = torch.rand(2, 3, 64, 96)
    outputs = network(images)
    anchors = torch.cat(network.anchors((64, 96), outputs.grids))
    target = TensorTarget(torch.tensor([[8.0, 8, 40, 40]]), torch.tensor([1]), torch.zeros(0, 4))
    losses = retinanet_losses(network.flatten(outputs), anchors, [target, target], LossConfig())
    losses.total.backward()
    still = [key for key, value in network.named_parameters() if value.grad is None or not value.grad.isfinite().all()]
    assert not still
    before = {key: value.detach().clone() for key, value in network.named_parameters()}
    optimiser.step()
    moved = {key for key, value in network.named_parameters() if not torch.equal(value, before[key])}
    assert {key.split(".")[0] for key in moved} == {"backbone", "head"}
    assert len(moved) > 0.9 * len(before)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width"), ALL)
def test_the_levels_have_the_strides_8_16_and_32(name: str, width: float) -> None:
    backbone = build_backbone(name, width=width)
    with torch.no_grad():
        levels = backbone.body.eval()(torch.zeros(1, 3, 64, 96))
    assert [tuple(level.shape[1:]) for level in levels.values()] == [
        (channels, 64 // stride, 96 // stride) for channels, stride in zip(backbone.channels, (8, 16, 32), strict=True)
    ]


def test_unknown_names_and_widths_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown backbone 'vgg16'; there are resnet18, .*mobilenet_v3_large"):
        build_backbone("vgg16")
    with pytest.raises(ValueError, match="resnet50 has no narrow form"):
        build_backbone("resnet50", width=0.5)
    with pytest.raises(ValueError, match="only for width 1"):
        build_backbone("resnet18", width=0.5, pretrained=True)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width"), ONE_OF_EACH_BLOCK)
def test_the_exported_file_finds_what_the_checkpoint_finds(name: str, width: float, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(config=config(name, width))
    export(checkpoint, tmp_path / "x.onnx", name=name)
    predictor = Predictor(torch_run(build_detector(checkpoint)), checkpoint.labels, SMALL_CANVAS)
    detector = Detector(tmp_path / "x.onnx", device="cpu")
    picture = draw(128, 200, seed=9)
    expected, found = predictor(picture), detector.detect(picture)
    absent, wanted = missing(expected, found, score_tolerance=1e-3)
    assert wanted >= 10
    assert absent <= 0.02 * wanted
    assert np.isin(found.labels, [label.class_id for label in checkpoint.labels]).all()
