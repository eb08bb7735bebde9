"""Fixtures of the tests on an engine: a clean checkout of HEAD, both images, and one project of one replica.

The project has a name and ports of its own, and is removed at the end. Grafana is not started: test_grafana.py asks the
dashboard's queries. Needs git, and an engine with the base images.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.engine.stack import ROOT, Stack, run
from tests.support.load import free_ports
from tests.support.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return folder


@pytest.fixture(scope="session")
def images(checkout: Path) -> dict[str, str]:
    """Both images, built as the README says."""
    names = {runtime: f"retinaserve:{runtime}" for runtime in ("cpu", "gpu")}
    network = os.environ.get("BUILD_NETWORK", "default")
    for runtime, name in names.items():
        options = ["--network", network, "--build-arg", f"RUNTIME={runtime}", "-f", "docker/Dockerfile", "-t", name]
        run("docker", "build", *options, ".", cwd=checkout)
    return names


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two small models, first.onnx and second.onnx."""
    folder = tmp_path_factory.mktemp("models")
    folder.chmod(0o755)
    for name, seed in (("first", 1), ("second", 2)):
        write_tiny_model(folder / f"{name}.onnx", name=name, seed=seed)
    return folder


@pytest.fixture(scope="session")
def stack(checkout: Path, images: dict[str, str], models: Path) -> Iterator[Stack]:
    """The project, with one replica that serves models/current.onnx, which is models/first.onnx."""
    settings = {"RETINASERVE_MODEL": "/models/current.onnx"}
    api_port, prometheus_port = free_ports(2)
    stack = Stack(checkout, models, api_port, prometheus_port, settings)
    stack.point_to("first.onnx")
    stack.down()
    try:
        stack.start(1)
        yield stack
    finally:
        stack.down()
