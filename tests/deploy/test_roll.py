"""docker/roll.sh against a stand-in for docker: what it replaces, what it removes, and how it fails.

tests/deploy/engine rolls real containers; here are the cases that take an engine long.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

DEPLOY = Path(__file__).parent
ROLL = DEPLOY.parents[1] / "docker" / "roll.sh"


@dataclass
class Project:
    """A Compose project in a file, and the folder that logs go to."""

    folder: Path

    def set_up(self, **world: Any) -> None:
        (self.folder / "docker.json").write_text(json.dumps(world))

    @property
    def world(self) -> Any:
        return json.loads((self.folder / "docker.json").read_text())

    @property
    def replicas(self) -> dict[str, list[str]]:
        """The containers of each service."""
        found: dict[str, list[str]] = {}
        for container in self.world["containers"]:
            found.setdefault(container["service"], []).append(container["id"])
        return found

    @property
    def logs(self) -> dict[str, str]:
        """The saved logs, by the container's name."""
        return {path.stem.split("-", 1)[1]: path.read_text() for path in (self.folder / "logs").glob("*.log")}

    def roll(self) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "FAKE_DOCKER": str(self.folder / "docker.json"),
            "LOGS_DIR": str(self.folder / "logs"),
        }
        command = [str(ROLL), "-f", "docker-compose.yml", "-f", "docker/cpu.yml"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "docker").write_text(f'#!/bin/sh\nexec {sys.executable} -S {DEPLOY / "fake_docker.py"} "$@"\n')
    (tmp_path / "docker").chmod(0o755)
    return Project(tmp_path)


def replica(identifier: str, service: str = "service", **state: str) -> dict[str, str]:
    return {
        "id": identifier,
        "service": service,
        "image": "sha256:old",
        "state": "running",
        "health": "healthy",
    } | state


IMAGES = {"retinaserve:cpu": "sha256:new"}


def test_every_replica_is_replaced_and_as_many_remain(project: Project) -> None:
    project.set_up(services={"service": 1}, images=IMAGES, containers=[replica("a"), replica("b"), replica("c")])
    result = project.roll()
    assert (result.returncode, result.stdout) == (0, "service: 3 new\n"), result.stderr
    assert project.replicas == {"service": ["new1", "new2", "new3"]}


def test_the_replicas_of_every_gpu_are_replaced(project: Project) -> None:
    containers = [replica("a"), replica("b", "service-1"), replica("c", "service-2")]
    project.set_up(services={"service": 1, "service-1": 1, "service-2": 1}, images=IMAGES, containers=containers)
    assert project.roll().returncode == 0
    assert project.replicas == {"service": ["new1"], "service-1": ["new2"], "service-2": ["new3"]}


def test_a_new_replica_that_does_not_start_is_shown_and_removed_and_the_old_ones_stay(project: Project) -> None:
    world = {"services": {"service": 2}, "images": IMAGES, "containers": [replica("a"), replica("b")]}
    project.set_up(**world, broken=["service"])
    result = project.roll()
    assert result.returncode == 1
    assert "new1 is not healthy: restarting, exit code 2, restarted 7 times" in result.stderr
    assert "  the log of new1" in result.stderr
    assert project.replicas == {"service": ["a", "b"]}
    assert project.logs == {"new1": "the log of new1\n"}


def test_the_roll_after_a_failed_one_works(project: Project) -> None:
    project.set_up(services={"service": 2}, images=IMAGES, containers=[replica("a"), replica("b")], broken=["service"])
    assert project.roll().returncode == 1
    project.set_up(**project.world | {"broken": []})
    assert project.roll().returncode == 0
    assert project.replicas == {"service": ["new2", "new3"]}


def test_a_roll_that_fails_in_its_middle_leaves_as_many_as_before(project: Project) -> None:
    project.set_up(services={"service": 2}, images=IMAGES, containers=[replica("a"), replica("b")], good=1)
    assert project.roll().returncode == 1
    assert project.replicas == {"service": ["b", "new1"]}


@pytest.mark.parametrize(
    "dead",
    [
        replica("dead", state="exited", health="unhealthy"),
        replica("dead", state="restarting", health="starting"),
        replica("dead", health="unhealthy"),
        replica("dead", state="created", health=""),
    ],
    ids=["exited", "crash loop", "unhealthy", "created"],
)
def test_a_replica_that_does_not_serve_is_removed_first_and_replaced(project: Project, dead: dict[str, str]) -> None:
    project.set_up(services={"service": 2}, images=IMAGES, containers=[replica("a"), dead])
    assert project.roll().returncode == 0
    assert project.replicas == {"service": ["new1", "new2"]}


def test_replicas_that_the_setting_wants_and_that_are_not_there_are_made(project: Project) -> None:
    project.set_up(services={"service": 3}, images=IMAGES, containers=[replica("a")])
    assert project.roll().returncode == 0
    assert project.replicas == {"service": ["new1", "new2", "new3"]}


def test_the_logs_of_what_is_replaced_are_kept(project: Project) -> None:
    project.set_up(services={"service": 1}, images=IMAGES, containers=[replica("a"), replica("b")])
    project.roll()
    assert project.logs == {"a": "the log of a\n", "b": "the log of b\n"}


def test_the_image_that_served_before_keeps_a_name(project: Project) -> None:
    project.set_up(services={"service": 1}, images=IMAGES, containers=[replica("a")])
    project.roll()
    assert project.world["images"] == {"retinaserve:cpu": "sha256:new", "retinaserve:cpu-previous": "sha256:old"}


def test_a_roll_for_new_settings_alone_keeps_the_name_of_the_image_before(project: Project) -> None:
    images = {"retinaserve:cpu": "sha256:old", "retinaserve:cpu-previous": "sha256:older"}
    project.set_up(services={"service": 1}, images=images, containers=[replica("a")])
    project.roll()
    assert project.world["images"] == images


def test_an_old_replica_is_stopped_before_it_is_removed(project: Project) -> None:
    project.set_up(services={"service": 1}, images=IMAGES, containers=[replica("a")])
    project.roll()
    ends = [call for call in project.world["calls"] if call[0] in ("stop", "rm")]
    assert ends == [["stop", "a"], ["rm", "--force", "a"]]
