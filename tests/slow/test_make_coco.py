"""`make coco`, with weights of our own in torchvision's form: the download of the real ones is not run."""

import subprocess
import sys
from pathlib import Path

import torch
from torchvision.models.detection import retinanet_resnet50_fpn_v2

from model.detector import Detector

ROOT = Path(__file__).parents[2]


def test_make_coco_makes_a_file_that_serves(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None).state_dict(), weights)
    settings = [f"COCO={tmp_path}", f"COCO_WEIGHTS={weights}", f"BIN={Path(sys.executable).parent}"]
    file = tmp_path / "coco.onnx"
    subprocess.run(["make", "--assume-old", "install", *settings, str(file)], cwd=ROOT, check=True, capture_output=True)
    metadata = Detector(file, device="cpu").metadata
    assert len(metadata.labels) == 91
    assert {label.label: label.class_id for label in metadata.labels}["person"] == 1
