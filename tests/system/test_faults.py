"""Networks that raise, answer NaN or hang, a full disk, no GPU: what the clients of a whole process are told.

The same faults around a detector written by hand are in test_engine.py.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from model.runtime.session import has_cuda_build
from tests.support.faulty_models import write_hanging_model, write_nan_model
from tests.support.load import Scrape, agree, ask, blocks, free_ports, listens
from tests.support.serving import picture, server_process, wait_until
from tests.support.tiny_model import write_tiny_model

WHITE = picture(colour=(255, 255, 255))
IMAGES = [blocks(80, 64, seed) for seed in range(10)]
"""Pictures of the white one's size, so that they share batches."""
NO_FILE_MAY_GROW = ("sh", "-c", 'ulimit -f 0; exec "$@"', "sh")


def write_raising_model(path: Path) -> None:
    write_tiny_model(path, fail_on_white=True)


def get(url: str, path: str) -> int:
    return ask(url, path, method="GET").status


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_raising_model, write_nan_model])
def test_a_network_that_fails_on_one_picture_answers_its_neighbours_as_ever(
    tmp_path: Path, write: Callable[[Path], object]
) -> None:
    write(tmp_path / "faulty.onnx")
    flags = ("--max-batch-size", "8", "--queue-capacity", "200", "--request-timeout-seconds", "100", "--threads", "1")
    with (
        server_process(tmp_path, *flags, model_path=tmp_path / "faulty.onnx") as server,
        ThreadPoolExecutor(40) as pool,
    ):
        alone = [json.loads(ask(server.url, body=image).body)["detections"] for image in IMAGES]
        asked = [number % len(IMAGES) if number % 4 else None for number in range(160)]
        answers = list(
            pool.map(lambda number: ask(server.url, body=WHITE if number is None else IMAGES[number]), asked)
        )
        for number, answer in zip(asked, answers, strict=True):
            values = json.loads(answer.body)
            if number is None:
                assert (answer.status, values["code"]) == (500, "inference_failed")
            else:
                assert answer.status == 200 and agree(values["detections"], alone[number])
        scrape = Scrape(server.url)
        assert scrape.by_label("retinaserve_requests_total", "outcome") == {"ok": 130, "error": 40}
        assert scrape("retinaserve_device_errors_total", kind="other") >= 1
        assert scrape("retinaserve_queue_depth") == 0
        assert get(server.url, "/healthz") == get(server.url, "/readyz") == 200


@pytest.mark.slow
def test_a_network_that_hangs_is_told_by_504_and_the_probes_and_does_not_hold_up_the_end(tmp_path: Path) -> None:
    write_hanging_model(tmp_path / "hanging.onnx")
    flags = ("--request-timeout-seconds", "1", "--drain-delay-seconds", "0", "--threads", "1", "--runs-at-once", "1")
    with server_process(tmp_path, *flags, model_path=tmp_path / "hanging.onnx") as server:
        wait_until(lambda: ask(server.url, body=IMAGES[0]).status == 200)
        late_before = Scrape(server.url)("retinaserve_requests_total", outcome="timeout")
        assert ask(server.url, body=WHITE).status == 504
        wait_until(lambda: get(server.url, "/healthz") == 503)
        assert get(server.url, "/readyz") == 503
        late = ask(server.url, body=IMAGES[0])
        assert (late.status, json.loads(late.body)["code"]) == (504, "deadline_exceeded")
        assert Scrape(server.url)("retinaserve_requests_total", outcome="timeout") == late_before + 2
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


@pytest.mark.slow
def test_where_no_byte_can_be_written_requests_are_served(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny.onnx")
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "service", "--model", str(tmp_path / "tiny.onnx"), "--port", str(port)]
    flags = ["--drain-delay-seconds", "0", "--threads", "1"]
    large = httpx.Request("POST", url, files={"image": picture(2000, 1500, kind="BMP")})
    with (
        open("/dev/full", "wb") as full,  # noqa: PTH123
        subprocess.Popen([*NO_FILE_MAY_GROW, *command, *flags], stdout=full, stderr=full) as process,
    ):
        try:
            wait_until(lambda: process.poll() is not None or listens(url))
            wait_until(lambda: process.poll() is not None or get(url, "/readyz") == 200)
            assert ask(url, "/detect", large.read(), large.headers).status == 200
            assert [ask(url, body=image).status for image in (*IMAGES, b"no image")] == [200] * len(IMAGES) + [422]
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


@pytest.mark.slow
def test_results_that_do_not_fit_on_the_disk_are_one_line_and_no_file(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny.onnx")
    (tmp_path / "image.png").write_bytes(IMAGES[0])
    command = [sys.executable, "-m", "service", "detect", str(tmp_path / "image.png"), "--out"]
    options = [str(tmp_path / "results.json"), "--model", str(tmp_path / "tiny.onnx")]
    finished = subprocess.run([*NO_FILE_MAY_GROW, *command, *options], capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].startswith("python -m service: error: ") and "too large" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "results.json").exists()


@pytest.mark.skipif(has_cuda_build(), reason="this ONNX Runtime is built for CUDA")
def test_without_the_provider_asked_for_it_does_not_start_and_auto_says_what_computes(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny.onnx")
    command = [sys.executable, "-m", "service", "--port", "0", "--model", str(tmp_path / "tiny.onnx")]
    finished = subprocess.run([*command, "--device", "cuda"], capture_output=True, text=True, timeout=100, check=False)
    assert finished.returncode == 2
    assert "built without CUDA" in finished.stderr and "Traceback" not in finished.stderr
    with server_process(tmp_path, "--device", "auto", model_path=tmp_path / "tiny.onnx") as server:
        card = json.loads(ask(server.url, "/model", method="GET").body)
        assert (card["device_requested"], card["provider"]) == ("auto", "CPUExecutionProvider")
