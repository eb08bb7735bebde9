"""Every backbone trains a step; one of each family is exported, and the file finds what the checkpoint finds.

ResNet-50's file is compared with torchvision in test_parity.py. The other deep ones are in tests/slow: their files are
made by the same code, in half a minute to a minute each.
"""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.ops import FrozenBatchNorm2d

from model.anchors import AnchorConfig
from model.backbones import BACKBONES, build_backbone
from model.detector import Detector
from model.image import to_canvas
from model.retinanet import RetinaNet, RetinaNetConfig
from tests.support.background import Background
from tests.support.networks import SMALL_CANVAS, TINY, draw, missing, tiny_checkpoint
from training.checkpoint import build_detector, load_checkpoint, save_checkpoint
from training.config import LossConfig
from training.evaluate import torch_run
from training.exchange.onnx_file import export
from training.loss.losses import retinanet_losses
from training.transforms import TensorTarget

THREE_LEVELS = AnchorConfig(base_sizes=(32, 64, 128))
"""P3 to P5, those that come from a backbone: a file of five takes half as long again to export."""
NARROW = (("resnet18", 0.25), ("resnet34", 0.5), ("mobilenet_v3_small", 0.5), ("mobilenet_v3_large", 0.5))
EXPORTED = ("resnet18", "resnext50_32x4d", "mobilenet_v3_small")
ALL = [(name, 1.0) for name in BACKBONES] + list(NARROW)


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


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v3_small"])
def test_a_frozen_norm_in_its_convolution_is_torchvisions_behind_it(name: str) -> None:
    """Under the same names, and with the same gradients."""
    torch.manual_seed(0)
    ours = build_backbone(name, norm="frozen").body
    theirs = getattr(models, name)(norm_layer=partial(FrozenBatchNorm2d, eps=1e-5))
    theirs = theirs.get_submodule("features") if name.startswith("mobilenet") else theirs
    for key, value in ours.state_dict().items():
        if "running_var" in key:
            value.uniform_(0.5, 2)
        elif "running_mean" in key or key.endswith(".bias"):
            value.normal_(std=0.1)
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected and all(key.startswith("fc.") for key in missing)
    images = torch.rand(2, 3, 64, 96)
    found = list(ours(images).values())[-1]
    layers = [module for key, module in theirs.named_children() if key not in ("avgpool", "fc")]
    expected = nn.Sequential(*layers)(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    direction = torch.randn_like(expected) / expected.abs().max().detach()
    for maps in (found, expected):
        (maps * direction).sum().backward()
    gradients = {key: value.grad for key, value in theirs.named_parameters() if value.grad is not None}
    assert len(gradients) == len(list(ours.parameters()))
    for key, value in ours.named_parameters():
        size = gradients[key].abs().max().item()
        torch.testing.assert_close(value.grad, gradients[key], rtol=1e-3, atol=1e-4 * size)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width"), ALL)
def test_the_levels_have_the_strides_8_16_and_32(name: str, width: float) -> None:
    backbone = build_backbone(name, width=width)
    with torch.no_grad():
        levels = backbone.body.eval()(torch.zeros(1, 3, 64, 96))
    assert [tuple(level.shape[1:]) for level in levels.values()] == [
        (channels, 64 // stride, 96 // stride) for channels, stride in zip(backbone.channels, (8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize(("name", "width"), NARROW)
@pytest.mark.parametrize("lowest", [2, 4, 5])
def test_the_levels_start_at_the_lowest_one_that_is_wanted(name: str, width: float, lowest: int) -> None:
    backbone = build_backbone(name, width=width, lowest_level=lowest)
    with torch.no_grad():
        levels = backbone.body.eval()(torch.zeros(1, 3, 64, 96))
    assert [tuple(level.shape[1:]) for level in levels.values()] == [
        (channels, 64 // 2**level, 96 // 2**level)
        for channels, level in zip(backbone.channels, range(lowest, 6), strict=True)
    ]
    with pytest.raises(ValueError, match="levels 2 to 5; the lowest one wanted is 1"):
        build_backbone(name, width=width, lowest_level=1)


def test_unknown_names_and_widths_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown backbone 'vgg16'; there are resnet18, .*mobilenet_v3_large"):
        build_backbone("vgg16")
    with pytest.raises(ValueError, match="resnet50 has no narrow form"):
        build_backbone("resnet50", width=0.5)
    with pytest.raises(ValueError, match="only for width 1"):
        build_backbone("resnet18", width=0.5, pretrained=True)


def checkpoint_and_file(folder: Path, name: str) -> Path:
    """The folder, with model.pt and model.onnx."""
    checkpoint = tiny_checkpoint(config=replace(config(name, 1.0), anchors=THREE_LEVELS))
    export(checkpoint, folder / "model.onnx", name=name)
    save_checkpoint(checkpoint, folder / "model.pt")
    return folder


FOLDERS = {name: Background(checkpoint_and_file, name) for name in EXPORTED}


@pytest.mark.slow
@pytest.mark.needs(*FOLDERS.values())
@pytest.mark.parametrize("name", FOLDERS)
def test_the_exported_file_finds_what_the_checkpoint_finds(name: str) -> None:
    assert_finds_the_same(FOLDERS[name].result())


def assert_finds_the_same(folder: Path) -> None:
    """Compare candidates, not detections: the last bit decides which of two near-equal boxes NMS keeps."""
    checkpoint = load_checkpoint(folder / "model.pt")
    run, detector = torch_run(build_detector(checkpoint)), Detector(folder / "model.onnx", device="cpu")
    canvases = [to_canvas(draw(128, 200, seed), SMALL_CANVAS) for seed in range(9, 13)]
    answers = [(run([canvas])[0], detector.run([canvas])[0]) for canvas in canvases]
    absent, wanted = np.sum([missing(expected, found, score_tolerance=2e-3) for expected, found in answers], axis=0)
    assert wanted >= 50 * len(canvases), f"only {wanted} candidates: nothing is shown"
    assert absent <= 0.01 * wanted
    known = [label.class_id for label in checkpoint.labels]
    found = detector.detect(draw(128, 200, 9))
    assert len(found) and np.isin(found.labels, known).all()
    shutil.rmtree(folder)  # hundreds of megabytes
