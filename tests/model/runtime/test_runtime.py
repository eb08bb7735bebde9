"""Which device computes."""

import logging
from pathlib import Path

import pytest

from model.detector import Detector
from model.runtime.session import DeviceUnavailable, has_cuda_build
from tests.support.tiny_model import write_tiny_model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "a.onnx", name="mine")
    return tmp_path / "a.onnx"


@pytest.mark.skipif(has_cuda_build(), reason="this ONNX Runtime is built for CUDA")
def test_where_cuda_cannot_be_used_auto_falls_back_and_says_so_and_cuda_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("model.runtime.has_cuda_build", lambda: True)
    detector = Detector(path, device="auto", threads=2, runs_at_once=2)
    assert (detector.fell_back, detector.provider, detector.lanes) == (True, "CPUExecutionProvider", 2)
    [record] = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert record.getMessage().startswith("CUDA cannot be used, model mine runs on the CPU: ")
    with pytest.raises(DeviceUnavailable, match="model mine cannot run on CUDA: "):
        Detector(path, device="cuda")


def test_the_cpu_is_no_fallback_where_it_was_asked_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.runtime.has_cuda_build", lambda: True)
    detector = Detector(path, device="cpu")
    assert (detector.fell_back, detector.provider) == (False, "CPUExecutionProvider")
