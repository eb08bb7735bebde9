from pathlib import Path

import onnxruntime as ort

from model.runtime.session import operators_on
from tests.support.tiny_model import write_tiny_model


def test_the_operators_a_provider_runs_can_be_listed(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "a.onnx")
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(tmp_path / "a.onnx", options, providers=["CPUExecutionProvider"])
    assert {"MatMul", "Sigmoid", "ArgMax"} <= operators_on(session, "CPUExecutionProvider")
    assert not operators_on(session, "CUDAExecutionProvider")
