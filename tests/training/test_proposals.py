"""The region proposal network, a preset of the same code: it trains, exports, and is served like any other model."""

import io
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image

from model.detector import Detector
from model.retinanet import RetinaNet
from tests.support.background import Background
from tests.support.networks import draw
from tests.support.serving import server_process
from training.checkpoint import Checkpoint, build_detector, load_checkpoint, save_checkpoint
from training.coco import OBJECT
from training.config import TrainConfig
from training.evaluate import torch_predictor
from training.exchange.onnx_file import export
from training.loss.losses import retinanet_losses
from training.presets import PRESETS
from training.transforms import TensorTarget

RPN = PRESETS["rpn"]
SMALL = replace(
    RPN,
    model=replace(
        RPN.model, backbone="resnet18", backbone_width=0.25, backbone_norm="batch", fpn_channels=16, head_channels=16
    ),
    resize=replace(RPN.resize, shorter_side=128, longest_side=224),
)


def test_the_preset_is_the_papers() -> None:
    assert RPN.model.level_anchors.levels == range(2, 7)
    assert (RPN.model.level_anchors.per_cell, RPN.model.level_anchors.base_sizes) == (3, (32, 64, 128, 256, 512))
    assert (RPN.loss.fg_iou_threshold, RPN.loss.bg_iou_threshold, RPN.loss.sampled_anchors) == (0.7, 0.3, 256)
    assert RPN.class_agnostic
    assert RPN.detection.max_detections == 1000


def checkpoint(config: TrainConfig) -> Checkpoint:
    """After some steps on one object in noise."""
    torch.manual_seed(0)
    network = RetinaNet(config.model, 1).train()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    target = TensorTarget(torch.tensor([[20.0, 24, 90, 100]]), torch.tensor([0]), torch.zeros(0, 4))
    images = torch.randn(2, 3, 128, 160)
    losses = []
    for step in range(8):
        outputs = network(images)
        anchors = torch.cat(network.anchors((128, 160), outputs.grids))
        loss = retinanet_losses(
            network.flatten(outputs), anchors, [target] * 2, config.loss, sizes=[(128, 160), (120, 150)], seed=step
        )
        optimiser.zero_grad()
        loss.total.backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        optimiser.step()
        losses.append(loss.total.item())
    assert losses[-1] < losses[0]
    return Checkpoint(config, (OBJECT,), network.state_dict())


def trained_and_exported(folder: Path) -> Path:
    """Make rpn.pt and rpn.onnx in the folder."""
    trained = checkpoint(SMALL)
    save_checkpoint(trained, folder / "rpn.pt")
    export(trained, folder / "rpn.onnx", name="proposals")
    return folder


TRAINED = Background(trained_and_exported)


@pytest.mark.slow
@pytest.mark.needs(TRAINED)
def test_it_trains_exports_and_is_served_like_any_other_model(tmp_path: Path) -> None:
    folder = TRAINED.result()
    trained, file = load_checkpoint(folder / "rpn.pt"), folder / "rpn.onnx"
    picture = draw(128, 192, seed=0)
    expected = torch_predictor(
        build_detector(trained), trained.labels, trained.config.resize, trained.config.detection
    )(picture)
    found = Detector(file, device="cpu").detect(picture)
    assert 100 < len(found) <= 1000
    assert abs(len(found) - len(expected)) <= 0.02 * len(expected)
    assert set(found.labels) == {OBJECT.class_id}
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    with server_process(tmp_path, "--device", "cpu", model_path=file) as server:
        response = httpx.post(server.url + "/detect", files={"image": buffer.getvalue()}, timeout=60)
    served = response.raise_for_status().json()["detections"]
    assert len(served) == len(found)
    assert {each["label"] for each in served} == {"object"}
