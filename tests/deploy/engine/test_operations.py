"""An operator's day on a real engine: the lines of docs/operations.md, each with what must be seen. Under load where
requests could be lost."""

import functools
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from tests.deploy.engine.stack import Load, Stack, docker, needs_engine
from tests.support.load import PNG, free_ports
from tests.support.serving import picture, wait_until

pytestmark = needs_engine

SECOND_GPU = """
services:
  service-1:
    extends: {file: docker-compose.yml, service: service}
    image: retinaserve:cpu
    environment: {RETINASERVE_DEVICE: cpu, RETINASERVE_MODEL: "/models/%s"}
    networks: !override {back: {aliases: [service]}}
    deploy: {replicas: 1, resources: {reservations: !reset null}}
  prometheus:
    environment: {EXPECTED_REPLICAS: "2"}
"""
"""docker/gpus.yml's shape without a GPU."""


KILL_THE_SERVICE = """
import os, pathlib, signal
for folder in pathlib.Path("/proc").glob("[0-9]*"):
    if b"python\\0-m\\0service" in (folder / "cmdline").read_bytes() and folder.name != "1":
        os.kill(int(folder.name), signal.SIGKILL)
"""


def two_services(stack: Stack, model: str) -> Stack:
    (stack.folder / "second.yml").write_text(SECOND_GPU % model)
    return stack.with_("second.yml")


def test_five_rolls_lose_nothing_and_page_nobody(stack: Stack) -> None:
    stack.start(1)
    seen: set[str] = set()
    with Load(stack.api, clients=2) as load:
        for _ in range(5):
            stack.roll()
            seen |= stack.alerts("firing")
        time.sleep(20)  # a scrape and an evaluation more
        seen |= stack.alerts("firing")
    assert set(load.answers) == {"first"}
    assert seen == set()


def test_a_failed_roll_says_why_loses_nothing_and_the_next_one_works(stack: Stack) -> None:
    stack.start(2)
    before = set(stack.replicas())
    with Load(stack.api) as load:
        failed = stack.with_(RETINASERVE_MODEL="/models/typo.onnx").try_to_roll()
        assert failed.returncode == 1, failed.stdout
        assert "/models/typo.onnx" in failed.stderr
        assert set(stack.replicas()) == before
        stack.roll()
        load.wait_for_answers(50)
    assert set(load.answers) == {"first"}
    assert len(stack.replicas()) == 2
    assert not before & set(stack.replicas())
    kept = [path.read_text() for path in (stack.folder / "logs").glob("*.log")]
    assert sum("/models/typo.onnx" in text for text in kept) == 1


def test_the_replicas_of_every_service_are_rolled(stack: Stack) -> None:
    both = two_services(stack, "first.onnx")
    both.up("service-1")
    before = set(both.compose("ps", "--quiet", "service", "service-1").split())
    with Load(stack.api) as load:
        both.roll()
    after = set(both.compose("ps", "--quiet", "service", "service-1").split())
    assert set(load.answers) == {"first"}
    assert len(before) == len(after) == 2
    assert not before & after


def test_the_number_of_replicas_is_kept_by_every_up(stack: Stack) -> None:
    two = stack.with_(REPLICAS="2")
    for _ in range(2):
        two.compose("up", "--detach", "--wait", "service", "proxy", "prometheus")
        assert len(two.replicas()) == 2
    wait_until(lambda: bool(stack.query("retinaserve_replicas_wanted == 2")))


def test_changed_rules_are_loaded_by_the_documented_line(stack: Stack) -> None:
    stack.start(1)
    rules = stack.folder / "docker" / "prometheus" / "rules.yml"
    text = rules.read_text()
    (rules.parent / ".next").write_text(text.replace("vector(0.999)", "vector(0.99)"))
    (rules.parent / ".next").rename(rules)  # as editors do it
    try:
        stack.compose("exec", "prometheus", "sh", "-c", "kill -HUP 1")
        wait_until(lambda: bool(stack.query("job:retinaserve_objective:ratio == 0.99")))
    finally:
        rules.write_text(text)
        stack.compose("exec", "prometheus", "sh", "-c", "kill -HUP 1")


def test_a_folder_of_keys_that_is_not_there_is_an_error_and_is_not_made(stack: Stack, tmp_path: Path) -> None:
    typo = stack.with_(KEYS_DIR=str(tmp_path / "typo"))
    command = ["docker", "compose", *typo.options, "up", "--detach", "prometheus"]
    failed = subprocess.run(command, cwd=stack.folder, env=typo.environment, capture_output=True, text=True)
    assert failed.returncode != 0
    assert f"{tmp_path}/typo/prometheus" in failed.stderr
    assert not (tmp_path / "typo").exists()


def test_a_replica_that_was_signalled_is_restarted_when_it_dies(stack: Stack) -> None:
    stack.start(1)
    stack.signal("HUP")
    [replica] = stack.replicas()
    subprocess.run(["docker", "exec", replica, "python", "-c", KILL_THE_SERVICE], check=True)
    wait_until(lambda: docker("inspect", "-f", "{{.RestartCount}} {{.State.Running}}", replica) == "1 true", 60)


def test_a_link_that_leads_nowhere_is_seen_as_long_as_it_lasts(stack: Stack) -> None:
    stack.start(1)
    differs = functools.partial(stack.query, "retinaserve_model_wanted_differs == 1")
    [replica] = stack.replicas()
    stack.point_to("typo.onnx")
    try:
        wait_until(lambda: bool(differs()), 60)
        wait_until(lambda: "the old one serves on" in log_of(replica), 60)
    finally:
        stack.point_to("first.onnx")
    wait_until(lambda: not differs(), 60)


def log_of(container: str) -> str:
    return subprocess.run(["docker", "logs", container], capture_output=True, text=True).stderr


def test_reloads_of_the_proxy_lose_no_request(stack: Stack) -> None:
    stack.start(2)
    with Load(stack.api) as load:
        for _ in range(2):
            stack.reload_proxy()
            load.wait_for_answers(50)
    assert set(load.answers) == {"first"}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder as KEYS_DIR, with a key for a client and Prometheus each."""
    tmp_path.chmod(0o755)
    for name in ("service", "prometheus", "alertmanager"):
        (tmp_path / name).mkdir()
    (tmp_path / "service" / "api-keys").write_text(f"alice:{'a' * 16}\nprometheus:{'p' * 16}\n")
    (tmp_path / "prometheus" / "key").write_text("p" * 16)
    return tmp_path


def write(path: Path, text: str) -> None:
    """As secret managers do it: a new file under the old name."""
    (path.parent / ".next").write_text(text)
    (path.parent / ".next").rename(path)


def test_keys_are_rotated_without_a_roll_or_a_lost_request(stack: Stack, keys: Path) -> None:
    locked = stack.with_(KEYS_DIR=str(keys), RETINASERVE_API_KEYS_FILE="/keys/api-keys")
    locked.start(1)
    replicas = locked.replicas()
    assert httpx.post(f"{stack.api}/detect", content=picture(), headers=PNG).status_code == 401
    old, new = {"X-API-Key": "a" * 16}, {"X-API-Key": "b" * 16}
    file = keys / "service" / "api-keys"

    def status(headers: dict[str, str]) -> int:
        return httpx.post(f"{stack.api}/detect", content=picture(), headers=PNG | headers).status_code

    with Load(stack.api, headers=old) as load:
        write(file, f"alice:{'a' * 16}\nalice:{'b' * 16}\nprometheus:{'p' * 16}\nprometheus:{'q' * 16}\n")
        wait_until(lambda: status(new) == 200)
        load.wait_for_answers(20)
    assert set(load.answers) == {"first"}
    write(keys / "prometheus" / "key", "q" * 16)
    time.sleep(6)  # a scrape
    write(file, f"alice:{'b' * 16}\nprometheus:{'q' * 16}\n")
    wait_until(lambda: status(old) == 401)
    assert status(new) == 200
    time.sleep(6)
    assert locked.targets_up() == 1
    assert locked.replicas() == replicas


def test_a_certificate_is_renewed_without_losing_a_request(stack: Stack, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    certificate = tmp_path / "site.pem"
    [port] = free_ports(1)

    def renew(name: str) -> None:
        options = f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={name}".split()
        command = ["openssl", *options, "-keyout", "-", "-out", "-"]
        write(certificate, subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        certificate.chmod(0o644)

    def subject() -> str:
        shown = subprocess.run(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{port}"], input="", capture_output=True, text=True
        )
        return next(line for line in shown.stdout.splitlines() if "subject=" in line).split("=")[-1].strip()

    renew("old")
    secure = stack.with_("docker/tls.yml", CERTIFICATES_DIR=str(tmp_path), HTTPS_PORT=str(port))
    secure.up()
    redirect = httpx.post(f"{stack.api}/detect", content=picture(), headers=PNG)
    assert (redirect.status_code, redirect.headers["location"]) == (308, f"https://127.0.0.1:{port}/detect")
    wait_until(lambda: subject() == "old")
    with Load(f"https://127.0.0.1:{port}") as load:
        renew("new")
        secure.reload_proxy()
        wait_until(lambda: subject() == "new")
        load.wait_for_answers(20)
    assert set(load.answers) == {"first"}


def test_a_canary_gets_a_share_and_is_measured_apart(stack: Stack) -> None:
    canary = stack.with_("docker/canary.yml", CANARY_MODEL="/models/second.onnx", CANARY_PERCENT="50")
    canary.up("canary")
    with Load(stack.api) as load:
        wait_until(lambda: load.answers.keys() >= {"first", "second"}, 60)
        wait_until(lambda: bool(stack.query('retinaserve_model_info{job="retinaserve-canary", name="second"}')))
    assert set(load.answers) == {"first", "second"}


@contextmanager
def webhook() -> Iterator[tuple[int, list[str]]]:
    """A receiver on every address of this machine: its port, and the alerts that it was sent."""
    received: list[str] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.extend(alert["labels"]["alertname"] for alert in body["alerts"])
            self.send_response(200)
            self.end_headers()

    with ThreadingHTTPServer(("0.0.0.0", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], received
        server.shutdown()


def test_a_replica_that_cannot_start_and_a_dead_proxy_page_within_two_minutes_and_reach_the_webhook(
    stack: Stack, keys: Path
) -> None:
    """The proxy dies once the replica is missed: what is missing must be known without it, too."""
    missing, down = "RetinaserveReplicasMissing", "RetinaserveProxyDown"
    alerting = stack.with_("docker/alerting.yml", KEYS_DIR=str(keys), ALERTMANAGER_PORT=str(free_ports(1)[0]))
    gateway = docker("network", "inspect", "retinaserve-test_front", "-f", "{{(index .IPAM.Config 0).Gateway}}")
    with webhook() as (port, received):
        (keys / "alertmanager" / "webhook").write_text(f"http://{gateway}:{port}/")
        has_image = is_there("alertmanager", alerting)
        two_services(alerting, "first.onnx").up("service-1", *["alertmanager"] * has_image)
        both = two_services(alerting, "typo.onnx")
        both.compose("up", "--detach", "--no-deps", "service-1")
        broken = time.monotonic()
        wait_until(lambda: missing in both.alerts("pending", "firing"), 90)
        both.compose("stop", "proxy")
        dead = time.monotonic()
        wait_until(lambda: missing in both.alerts("firing"), 150)
        assert time.monotonic() - broken < 120
        wait_until(lambda: down in both.alerts("firing"), 150)
        assert time.monotonic() - dead < 120
        # What is not there has no address to be named by, but between its starts one may be seen not to answer.
        assert both.alerts("firing") <= {missing, down, "RetinaserveDown"}
        if not has_image:
            pytest.skip("they page; Alertmanager's image cannot be pulled, so the webhook was not asked")
        wait_until(lambda: {missing, down} <= set(received), 120)
    assert set(received) <= {missing, down, "RetinaserveDown"}, "and no Watchdog"


def is_there(service: str, stack: Stack) -> bool:
    """Tell whether the engine has the service's image, or can pull it."""
    image = stack.compose("config", "--images", service).splitlines()[-1]
    known = subprocess.run(["docker", "image", "inspect", image], capture_output=True).returncode == 0
    return known or subprocess.run(["docker", "pull", image], capture_output=True).returncode == 0
