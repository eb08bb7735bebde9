"""The Compose project on a real engine, clients that load it, and containers of their own; for `make docker-test`."""

import json
import os
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from tests.support.load import PNG
from tests.support.serving import picture, wait_until

ROOT = Path(__file__).parents[3]


def why_not_run() -> str:
    if os.environ.get("DOCKER_TEST") != "1":
        return "run by `make docker-test`"
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        return "no Docker engine answers"
    return ""


needs_engine = [
    pytest.mark.skipif(bool(why_not_run()), reason=why_not_run()),
    pytest.mark.slow,
    pytest.mark.timeout(900),
]


def run(*command: str, **options: Any) -> str:
    """The command's output; its errors are the failure's message."""
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-2000:]}{result.stderr[-4000:]}"
    return result.stdout.strip()


def docker(*arguments: str) -> str:
    return run("docker", *arguments)


@dataclass(frozen=True)
class Stack:
    """The checkout, and the project that is started from it."""

    folder: Path
    models: Path
    api_port: int
    prometheus_port: int
    settings: dict[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ("docker-compose.yml", "docker/cpu.yml")

    def with_(self, *overlays: str, **settings: str) -> "Stack":
        """The same project with more files and settings."""
        return replace(self, files=(*self.files, *overlays), settings=self.settings | settings)

    @property
    def options(self) -> list[str]:
        return [option for name in self.files for option in ("-f", name)]

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    @property
    def prometheus(self) -> str:
        return f"http://127.0.0.1:{self.prometheus_port}"

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "COMPOSE_PROJECT_NAME": "retinaserve-test",
            "MODELS_DIR": str(self.models),
            "API_PORT": str(self.api_port),
            "PROMETHEUS_PORT": str(self.prometheus_port),
            **self.settings,
        }

    def compose(self, *arguments: str) -> str:
        return run("docker", "compose", *self.options, *arguments, cwd=self.folder, env=self.environment)

    def roll(self) -> None:
        run("docker/roll.sh", *self.options, cwd=self.folder, env=self.environment)

    def try_to_roll(self) -> "subprocess.CompletedProcess[str]":
        command = ["docker/roll.sh", *self.options]
        return subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)

    def signal(self, name: str) -> None:
        """Signal every replica, as docs/operations.md says: from inside, so that Docker goes on restarting it."""
        for replica in self.replicas():
            docker("exec", replica, "sh", "-c", f"kill -{name} 1")

    def reload_proxy(self) -> None:
        self.compose("exec", "proxy", "sh", "-c", "kill -USR2 1")

    def alerts(self, *states: str) -> set[str]:
        """The alerts in these states, without the Watchdog."""
        alerts = httpx.get(f"{self.prometheus}/api/v1/alerts").json()["data"]["alerts"]
        return {a["labels"]["alertname"] for a in alerts if a["state"] in states} - {"Watchdog"}

    def up(self, *more: str, replicas: int = 1) -> None:
        """Make the project what its files and settings say, whatever a test before left; `more` are services."""
        self.compose(
            "up", "--detach", "--remove-orphans", "--wait", "--wait-timeout", "60", "--scale", f"service={replicas}",
            "service", "proxy", "prometheus", *more,
        )  # fmt: skip

    def start(self, replicas: int) -> None:
        self.up(replicas=replicas)
        wait_until(lambda: self.targets_up() == replicas)

    def down(self) -> None:
        """Remove the project and all its volumes. Alertmanager's (an overlay's) knows what it has sent, and does
        not send it again within the hour."""
        self.compose("down", "--remove-orphans", "--volumes", "--timeout", "5")
        label = f"label=com.docker.compose.project={self.environment['COMPOSE_PROJECT_NAME']}"
        for volume in docker("volume", "ls", "--quiet", "--filter", label).split():
            docker("volume", "rm", volume)

    def replicas(self) -> list[str]:
        return self.compose("ps", "--quiet", "service").split()

    def serves(self, replica: str, model: str) -> bool:
        return bool(json.loads(get(replica, "/model"))["name"] == model)

    def query(self, expr: str) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self.prometheus}/api/v1/query", params={"query": expr}).json()
        return answer["data"]["result"]  # type: ignore[no-any-return]

    def targets_up(self) -> int:
        """Replicas that Prometheus scrapes now. (A query would also see those from before its own restart.)"""
        targets = httpx.get(f"{self.prometheus}/api/v1/targets").json()["data"]["activeTargets"]
        return sum(target["labels"]["job"] == "retinaserve" and target["health"] == "up" for target in targets)

    def point_to(self, model: str) -> None:
        """Serve this file of the models folder, as the README says."""
        (self.models / ".next").symlink_to(model)
        (self.models / ".next").rename(self.models / "current.onnx")


@dataclass
class Load:
    """Clients that post one picture after the other through the proxy, as long as the block lasts."""

    url: str
    clients: int = 4
    headers: dict[str, str] = field(default_factory=dict)
    answers: Counter[str] = field(default_factory=Counter)
    """How many answers of each kind: the model's name for a 200, else the status or the broken connection."""
    failures: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._post) for _ in range(self.clients)]
        for thread in self._threads:
            thread.start()
        self.wait_for_answers(20)
        return self

    def __exit__(self, *error: object) -> None:
        print("\n".join(self.failures))
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _post(self) -> None:
        with httpx.Client(timeout=60, verify=False, headers=PNG | self.headers) as client:
            while not self._over.wait(0.01):
                try:
                    answer = client.post(f"{self.url}/detect", content=picture())
                    good = answer.status_code == 200
                    self.answers[answer.json()["model"]["name"] if good else str(answer.status_code)] += 1
                    if not good:
                        self.failures.append(answer.text)
                except httpx.TransportError as error:
                    self.answers[type(error).__name__] += 1

    def wait_for_answers(self, number: int) -> None:
        wanted = self.answers.total() + number
        wait_until(lambda: self.answers.total() >= wanted)


def until_it_ends(*command: str) -> tuple[int, list[str]]:
    """Run a container that ends by itself: its exit code and the lines it wrote on standard error."""
    result = subprocess.run(["docker", "run", "--rm", *command], capture_output=True, text=True)
    return result.returncode, result.stderr.splitlines()


@contextmanager
def started(*command: str) -> Iterator[str]:
    """A container of its own, hardened as in Compose, once it is healthy."""
    hardened = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--ipc", "none"]
    container = docker("run", "--detach", *hardened, *command)
    try:
        wait_until(lambda: docker("inspect", "-f", "{{.State.Health.Status}}", container) == "healthy", 60)
        yield container
    finally:
        docker("rm", "--force", container)


def get(container: str, path: str) -> str:
    program = f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:8000{path}').read().decode())"
    return docker("exec", container, "python", "-c", program)
