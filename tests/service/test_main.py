"""The command, as a process of its own: start, signals, drain, reload, logs."""

import asyncio
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from service.__main__ import listen, serve
from service.config import Settings
from tests.support.faulty_models import write_slow_model
from tests.support.load import connected, listens, request_head
from tests.support.serving import PNG, ServerProcess, detect, picture, server_process, wait_until
from tests.support.tiny_model import write_tiny_model


def status(server: ServerProcess, path: str) -> int:
    return httpx.get(server.url + path, verify=False).status_code


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "service", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def run_each(*flags: tuple[str, ...]) -> "list[subprocess.CompletedProcess[str]]":
    """Run it with each of these, two at once."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda arguments: run(*arguments), flags))


def assert_one_line_and_code_2(finished: "subprocess.CompletedProcess[str]", says: str) -> None:
    assert finished.returncode == 2
    lines = [line for line in finished.stderr.splitlines() if not line.startswith("{")]
    assert len(lines) == 1 and says in lines[0], finished.stderr


def test_sigterm_drains_not_ready_at_once_but_serving_then_exits_0(tmp_path: Path) -> None:
    with server_process(tmp_path, "--drain-delay-seconds", "2") as server:
        assert "connection" not in detect(server).headers
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: status(server, "/readyz") == 503)
        answer = detect(server)
        assert answer.status_code == 200
        assert answer.headers["connection"] == "close", "the client's next connection goes elsewhere"
        assert status(server, "/healthz") == 200
        assert server.process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            detect(server)


def test_what_is_in_flight_when_the_listener_closes_is_answered(tmp_path: Path) -> None:
    image = picture()
    with server_process(tmp_path, "--drain-delay-seconds", "0") as server:
        with connected(server.url) as connection:
            connection.sendall(request_head(len(image)) + image[:10])
            wait_until(lambda: "http_requests_in_flight 2.0" in httpx.get(server.url + "/metrics").text)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not listens(server.url))
            connection.sendall(image[10:])
            assert b" 200 OK" in connection.recv(65536)
        assert server.process.wait(30) == 0


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    with server_process(tmp_path, "--drain-delay-seconds", "1000") as server:
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: status(server, "/readyz") == 503)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 128 + signal.SIGTERM


def test_ctrl_c_does_not_wait_for_the_drain_delay(tmp_path: Path) -> None:
    with server_process(tmp_path, "--drain-delay-seconds", "1000") as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0


def test_sighup_reloads_and_a_bad_file_changes_nothing(tmp_path: Path) -> None:
    def name() -> object:
        return httpx.get(server.url + "/model").json()["name"]

    with server_process(tmp_path, "--model-poll-seconds", "0") as server:
        write_tiny_model(tmp_path / "new.onnx", name="other")
        (tmp_path / "new.onnx").replace(server.model_path)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: name() == "other")
        server.model_path.write_bytes(server.model_path.read_bytes()[:-100])
        server.process.send_signal(signal.SIGHUP)
        failed = 'retinaserve_model_reloads_total{outcome="failure"} 1.0'
        wait_until(lambda: failed in httpx.get(server.url + "/metrics").text)
        assert name() == detect(server).json()["model"]["name"] == "other"


def test_each_request_is_one_json_line_and_the_first_line_has_the_settings(tmp_path: Path) -> None:
    flags = ("--api-keys", "geheim", "--cors-origins", "https://a.example")
    with server_process(tmp_path, *flags) as server:
        headers = PNG | {"X-API-Key": "geheim", "X-Request-ID": "abc"}
        assert httpx.post(server.url + "/detect", content=picture(90, 60), headers=headers).status_code == 200
        assert httpx.post(server.url + "/detect", content=b"x", headers=headers).status_code == 422
        wait_until(lambda: len([line for line in server.log() if line.get("route") == "/detect"]) == 2)
        ok, bad = (line for line in server.log() if line.get("route") == "/detect")
        start = next(line for line in server.log() if str(line["message"]).startswith("listening on"))
    assert (ok["request_id"], ok["outcome"], ok["status"], ok["images"], ok["model"]) == (
        "abc", "ok", 200, ["90x60"], "tiny",
    )  # fmt: skip
    assert set(ok["timing_ms"]) >= {"read", "decode", "inference", "total"}  # type: ignore[call-overload]
    assert (bad["outcome"], bad["status"]) == ("invalid", 422)
    assert start["settings"]["queue_capacity"] == 32  # type: ignore[index]
    assert "geheim" not in server.log_path.read_text()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_the_host_of_all_ipv6_addresses_takes_ipv4_too() -> None:
    with listen("::", 0) as listening:
        for host in ("::1", "127.0.0.1"):
            socket.create_connection((host, listening.getsockname()[1]), timeout=5).close()


def test_while_the_model_loads_it_is_alive_but_not_ready_and_can_be_stopped(tmp_path: Path) -> None:
    never_read = tmp_path / "model.onnx"
    os.mkfifo(never_read)
    with server_process(tmp_path, "--drain-delay-seconds", "0", model_path=never_read, ready=False) as server:
        wait_until(lambda: listens(server.url))
        assert (status(server, "/healthz"), status(server, "/readyz"), status(server, "/model")) == (200, 503, 503)
        answer = detect(server)
        assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
        assert "retry-after" in answer.headers
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0


def test_what_the_first_load_leaves_is_not_searched_for_garbage_again(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny.onnx")
    gc.unfreeze()

    def stop_when_frozen() -> None:
        try:
            wait_until(lambda: gc.get_freeze_count() > 0)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor() as pool:
        stopped = pool.submit(stop_when_frozen)
        try:
            assert asyncio.run(serve(Settings(model=tmp_path / "tiny.onnx", port=0))) == (0, False)
            stopped.result()
        finally:
            gc.unfreeze()


@pytest.mark.slow
def test_a_setting_that_cannot_be_used_is_one_line_and_code_2(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    write_tiny_model(tmp_path / "tiny.onnx")
    none, bad, tiny, missing = (str(tmp_path / name) for name in ("none.onnx", "bad.onnx", "tiny.onnx", "none.pem"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        wrong = {
            ("--queue-capacity", "none"): "--queue-capacity",
            ("--port", "0", "--model", none): "none.onnx",
            ("--port", "0", "--model", bad): "bad.onnx",
            ("--port", "0", "--model", tiny, "--model-sha256", "0" * 64): "sha256",
            ("--port", port): f"127.0.0.1:{port}: Address already in use",
            ("--port", "0", "--ssl-certfile", missing, "--ssl-keyfile", missing): "TLS",
        }
        for finished, says in zip(run_each(*wrong), wrong.values(), strict=True):
            assert_one_line_and_code_2(finished, says)


@pytest.mark.slow
def test_a_model_that_is_not_warm_in_time_is_one_line_and_code_2(tmp_path: Path) -> None:
    write_slow_model(tmp_path / "slow.onnx", 3000)
    finished = run("--port", "0", "--model", str(tmp_path / "slow.onnx"), "--model-load-timeout-seconds", "1")
    assert_one_line_and_code_2(finished, "not loaded and warmed up within 1 s")


@pytest.mark.slow
def test_with_json_logs_the_line_before_code_2_is_json_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETINASERVE_LOG_FORMAT", "json")
    keys = tmp_path / "keys"
    keys.write_text("alice:short\n")
    wrong = {
        ("--queue-capacity", "none"): "--queue-capacity",
        ("--port", "0", "--api-keys-file", str(keys)): f"line 1 of {keys}",
        ("--port", "0", "--model", str(tmp_path / "none.onnx")): "none.onnx",
    }
    for finished, says in zip(run_each(*wrong), wrong.values(), strict=True):
        last = json.loads(finished.stderr.splitlines()[-1])
        assert (finished.returncode, last["level"]) == (2, "error"), finished.stderr
        assert says in last["message"]
        assert "short" not in last["message"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_tls_is_served_from_a_certificate_and_its_key(tmp_path: Path) -> None:
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=x",
         "-keyout", key, "-out", certificate],
        capture_output=True, check=True,
    )  # fmt: skip
    with server_process(tmp_path, "--ssl-certfile", certificate, "--ssl-keyfile", key) as server:
        assert server.url.startswith("https://")
        assert detect(server).status_code == 200


def test_the_service_needs_neither_torch_nor_onnx() -> None:
    code = "import sys, service.__main__; print([name for name in ('torch', 'onnx') if name in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(finished.stdout.replace("'", '"')) == []
