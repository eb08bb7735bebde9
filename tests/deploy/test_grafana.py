"""The dashboard: drawn from its list, one screen, each query answered by a Prometheus that scrapes a busy service."""

import functools
import json
import math
import re
import runpy
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from service.metrics import Metrics
from tests.support.load import constantly, free_ports
from tests.support.serving import FakeDetector, detect, serving, wait_until

DOCKER = Path(__file__).parents[2] / "docker"
DASHBOARD = json.loads((DOCKER / "grafana" / "retinaserve.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]

GPU_METRICS = """\
retinaserve_gpu_memory_used_bytes{gpu="0"} 2e9
retinaserve_gpu_memory_total_bytes{gpu="0"} 8e9
retinaserve_gpu_utilization_ratio{gpu="0"} 0.5
"""


def recorded_names() -> set[str]:
    groups = yaml.safe_load((DOCKER / "prometheus" / "rules.yml").read_text())["groups"]
    return {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}


def metric_names(text: str) -> set[str]:
    return set(re.findall(r"\b(?:\w+:)?(?:retinaserve|http)_\w+(?::\w+)?", text))


def test_the_file_is_what_the_list_draws() -> None:
    drawn = runpy.run_path(str(DOCKER / "grafana" / "dashboard.py"))["render"]()
    assert drawn == DASHBOARD, "run: python docker/grafana/dashboard.py > docker/grafana/retinaserve.json"


def test_it_fills_one_screen_without_gaps_or_overlaps() -> None:
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert sorted(cells) == [(x, y) for x in range(24) for y in range(24)]


def test_queries_and_rules_name_only_metrics_that_exist() -> None:
    from_service = metric_names(Metrics().text().decode()) | metric_names(GPU_METRICS)
    rules = yaml.safe_load((DOCKER / "prometheus" / "rules.yml").read_text())["groups"]
    asked = metric_names(" ".join([rule["expr"] for group in rules for rule in group["rules"]]))
    asked |= metric_names(" ".join(QUERIES))
    by_compose = {"retinaserve_replicas_wanted"}
    assert asked - from_service - recorded_names() == by_compose


class GpuReplica(BaseHTTPRequestHandler):
    """Stands in for a replica with a GPU: its metrics and nothing else."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(GPU_METRICS.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def gpu_replica() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), GpuReplica) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@contextmanager
def prometheus(folder: Path, targets: list[str]) -> Iterator[str]:
    """A real Prometheus with the product's rules, scraping these."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(DOCKER / "prometheus" / "rules.yml")],
        "scrape_configs": [{"job_name": "retinaserve", "static_configs": [{"targets": targets}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    [port] = free_ports(1)
    address = f"127.0.0.1:{port}"
    options = {
        "config.file": folder / "prometheus.yml",
        "storage.tsdb.path": folder / "tsdb",
        "web.listen-address": address,
    }
    command = ["prometheus", *(f"--{name}={value}" for name, value in options.items())]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: process.poll() is not None or answers(f"http://{address}/-/ready"))
        assert process.poll() is None, f"prometheus ended with {process.returncode}"
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def has_data(server: str, expr: str) -> bool:
    """Tell whether the query has at least one finite value now."""
    answer: dict[str, Any] = httpx.get(f"{server}/api/v1/query", params={"query": expr}).json()
    assert answer["status"] == "success", answer
    return any(math.isfinite(float(sample["value"][1])) for sample in answer["data"]["result"])


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed (Debian: apt install prometheus)"
)
def test_every_panel_has_data_under_load(tmp_path: Path) -> None:
    def post(client: int) -> None:
        time.sleep(0.05)
        detect(replica)

    with (
        serving(FakeDetector()) as replica,
        constantly(1, post),
        gpu_replica() as gpu,
        prometheus(tmp_path, [replica.url.removeprefix("http://"), gpu]) as server,
    ):
        for expr in QUERIES:
            wait_until(functools.partial(has_data, server, expr))
