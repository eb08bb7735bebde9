"""It equals torchvision: its RetinaNets, imported, exported, served, against their own forward pass.

Random weights amplify a grey level of difference in the resize, so the pictures have the size that the network wants:
the scale is exactly 1. The resize itself is compared in test_image.py.
"""

import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from model.detector import Detector
from model.metadata import ResizePolicy
from model.types import Detections, Pixels
from tests.support.background import Background
from tests.support.networks import assert_agree, draw, enliven, tiny_checkpoint
from tests.support.serving import server_process
from training.checkpoint import build_detector
from training.evaluate import Predictor, torch_run
from training.exchange.onnx_file import export
from training.exchange.torchvision import ARCHITECTURES, import_weights

RESIZE = ResizePolicy(shorter_side=224, longest_side=352)
SIZES = ((224, 225), (224, 250), (224, 288), (224, 300), (224, 321), (224, 352))
PICTURES = [draw(*size, seed=seed) for seed, size in enumerate([*SIZES, *(size[::-1] for size in SIZES)])]
"""Both orientations, most sides no multiple of 32; on P6 and P7 torchvision's strides are not the true ones."""


@dataclass(frozen=True)
class Case:
    file: Path
    """Imported and exported."""
    expected: list[Detections]
    """torchvision's own answers to PICTURES."""


def imported_and_exported(folder: Path, arch: str) -> Case:
    torch.manual_seed(0)
    network = getattr(torchvision.models.detection, arch)(
        weights=None, weights_backbone=None, min_size=RESIZE.shorter_side, max_size=RESIZE.longest_side
    )
    enliven(network, [draw(224, 288, seed) for seed in range(100, 102)])
    torch.save(network.state_dict(), folder / "weights.pth")
    checkpoint = import_weights(arch, str(folder / "weights.pth"))
    (folder / "weights.pth").unlink()
    config = replace(checkpoint.config, resize=RESIZE)
    export(replace(checkpoint, config=config), folder / "imported.onnx", name="imported")
    return Case(folder / "imported.onnx", [torchvisions(network, picture) for picture in PICTURES])


def torchvisions(network: torch.nn.Module, picture: Pixels) -> Detections:
    with torch.inference_mode():
        [answer] = network([torch.from_numpy(picture).permute(2, 0, 1) / 255])
    return Detections(*(answer[key].numpy() for key in ("boxes", "scores", "labels")))


def halved(folder: Path) -> Path:
    export(tiny_checkpoint(), folder / "half.onnx", name="tiny", precision="fp16")
    return folder / "half.onnx"


CASES = {arch: Background(imported_and_exported, arch) for arch in ARCHITECTURES}
HALF = Background(halved)
pytestmark = [pytest.mark.slow, pytest.mark.needs(*CASES.values(), HALF)]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    case = CASES[request.param].result()
    yield case
    shutil.rmtree(case.file.parent)  # 150 MB


def test_the_exported_file_finds_what_torchvision_finds(case: Case) -> None:
    detector = Detector(case.file, device="cpu", threads=1)
    assert_agree(
        [(theirs, detector.detect(picture)) for theirs, picture in zip(case.expected, PICTURES, strict=True)],
        score_tolerance=2e-3,
    )


def test_the_service_finds_what_torchvision_finds(case: Case, tmp_path: Path) -> None:
    with server_process(tmp_path, "--device", "cpu", model_path=case.file) as server:
        answers = [posted(server.url, picture) for picture in PICTURES]
    assert_agree(list(zip(case.expected, answers, strict=True)), score_tolerance=2e-3)


def posted(url: str, picture: Pixels) -> Detections:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    response = httpx.post(url + "/detect", files={"image": buffer.getvalue()}, timeout=60)
    found = response.raise_for_status().json()["detections"]
    sides = ("xmin", "ymin", "xmax", "ymax")
    return Detections(
        np.array([[entry["box"][side] for side in sides] for entry in found], np.float32).reshape(-1, 4),
        np.array([entry["score"] for entry in found], np.float32),
        np.array([entry["class_id"] for entry in found], np.int64),
    )


def test_half_precision_finds_what_the_checkpoint_finds() -> None:
    checkpoint = tiny_checkpoint()
    half = Detector(HALF.result(), device="cpu")
    assert half.metadata.precision == "fp16"
    single = Predictor(torch_run(build_detector(checkpoint)), checkpoint.labels, checkpoint.config.resize)
    pictures = [draw(128, 192, seed) for seed in range(12)]
    assert_agree([(single(picture), half.detect(picture)) for picture in pictures], score_tolerance=0.01)
