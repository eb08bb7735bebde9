"""A Ray cluster of two nodes on this machine, and the service on it: deployed as KubeRay does, by Ray's REST API."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.cluster_utils import Cluster

from tests.support.load import free_ports
from tests.support.serving import wait_until
from tests.support.tiny_model import write_tiny_model

APPLICATION, DEPLOYMENT = "retinaserve", "Detection"
PATIENCE_SECONDS = 120
NODE = {"num_cpus": 4, "object_store_memory": 90 * 2**20}
"""Logical CPUs: more than the machine has, so that a rollout finds room for as many replicas again."""


@dataclass(frozen=True)
class Replica:
    replica_id: str
    process_id: int | None
    """None: it has not started."""
    node_id: str | None
    state: str


@dataclass
class RayService:
    url: str
    dashboard: str
    metrics_ports: tuple[int, ...]
    model: Path
    cluster: Cluster

    def delete(self) -> None:
        self._put([])
        wait_until(lambda: not self.replicas(), PATIENCE_SECONDS)

    def kill_a_node(self) -> None:
        """Kill the second node and what runs on it at once, as a power cut does."""
        node = self.cluster.list_all_nodes()[-1]
        for replica in self.replicas():
            if replica.node_id == node.node_id and replica.process_id is not None:
                os.kill(replica.process_id, signal.SIGKILL)
        self.cluster.remove_node(node, allow_graceful=False)

    def add_a_node(self) -> None:
        self.cluster.add_node(**NODE)

    def deploy(self, *, user_config: dict[str, Any] | None = None, **arguments: object) -> None:
        """Deploy, and wait until there are the replicas that there should be."""
        deployment = {"name": DEPLOYMENT} | ({} if user_config is None else {"user_config": user_config})
        application = {
            "name": APPLICATION,
            "route_prefix": "/",
            "import_path": "cluster.serve:app",
            "args": {"model": str(self.model), "model_poll_seconds": 0, "log_format": "json", "threads": 1}
            | {"decode_threads": 1, "runs_at_once": 1}
            | arguments,
            "deployments": [deployment],
        }
        self._put([application])
        wait_until(self.is_deployed, PATIENCE_SECONDS)

    def _put(self, applications: list[dict[str, Any]]) -> None:
        address = httpx.URL(self.url)
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": address.host, "port": address.port},
            "applications": applications,
        }
        put = httpx.put(f"{self.dashboard}/api/serve/applications/", json=config, timeout=PATIENCE_SECONDS)
        assert put.status_code == 200, put.text

    def details(self) -> Any:
        """Ray's account of the application. It takes Ray 50 ms, so nobody asks without a pause."""
        time.sleep(0.2)
        answer = httpx.get(f"{self.dashboard}/api/serve/applications/", timeout=PATIENCE_SECONDS)
        return answer.json()["applications"].get(
            APPLICATION, {"status": "NOT_STARTED", "message": "", "deployments": {}}
        )

    def is_deployed(self) -> bool:
        details = self.details()
        assert details["status"] != "DEPLOY_FAILED", details["message"]
        states = {replica.state for replica in self.replicas()}
        return details["status"] == "RUNNING" and states == {"RUNNING"}

    def replicas(self) -> list[Replica]:
        deployments = self.details()["deployments"]
        found = deployments[DEPLOYMENT]["replicas"] if deployments else []
        return [Replica(each["replica_id"], each.get("pid"), each.get("node_id"), each["state"]) for each in found]

    def process_ids(self) -> set[int | None]:
        return {replica.process_id for replica in self.replicas()}

    def figures(self, name: str, label: str) -> dict[str, float]:
        """Read a figure by a label, summed over the replicas that there are now. Ray renews it every 10 s."""
        values: dict[str, float] = {}
        replica_ids = {replica.replica_id for replica in self.replicas()}
        for port in self.metrics_ports:
            text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_SECONDS).text
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.name == name and sample.labels["replica"] in replica_ids:
                        values[sample.labels[label]] = values.get(sample.labels[label], 0) + sample.value
        return values


@contextlib.contextmanager
def ray_service(folder: Path) -> Iterator[RayService]:
    """Two nodes, and nothing deployed; all of it is ended at the end."""
    port, dashboard_port, *metrics_ports = free_ports(4)
    model = folder / "tiny.onnx"
    write_tiny_model(model)
    head = NODE | {"include_dashboard": True, "dashboard_port": dashboard_port, "metrics_export_port": metrics_ports[0]}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(**NODE, metrics_export_port=metrics_ports[1])
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield RayService(
            f"http://127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}", tuple(metrics_ports), model, cluster
        )
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()
