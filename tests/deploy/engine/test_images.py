"""The images on a real engine: what they hold, how they start, alone and hardened as in Compose."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.deploy.engine.stack import ROOT, docker, get, needs_engine, run, started, until_it_ends

pytestmark = needs_engine


def test_the_image_alone_serves_the_demo_model(images: dict[str, str]) -> None:
    with started(images["cpu"]) as container:
        assert json.loads(get(container, "/model"))["name"] == "shapes"


@pytest.mark.parametrize("runtime", ["cpu", "gpu"])
def test_asking_for_cuda_without_a_gpu_ends_with_one_clear_line(
    images: dict[str, str], models: Path, runtime: str
) -> None:
    model = f"{models}/first.onnx:/first.onnx:ro"
    code, lines = until_it_ends("-v", model, images[runtime], "--model", "/first.onnx", "--device", "cuda")
    assert code == 2
    [error] = [line for line in lines if line.startswith("python -m service: error: ")]
    assert error == lines[-1]
    assert "CUDA" in error


def test_the_gpu_image_on_a_host_without_one_says_loudly_that_it_runs_on_the_cpu(
    images: dict[str, str], models: Path
) -> None:
    model = f"{models}/first.onnx:/first.onnx:ro"
    with started("-v", model, images["gpu"], "--model", "/first.onnx", "--log-format", "json") as container:
        assert "retinaserve_provider_fallback 1.0" in get(container, "/metrics")
        assert json.loads(get(container, "/model"))["provider"] == "CPUExecutionProvider"
        log = subprocess.run(["docker", "logs", container], capture_output=True, text=True).stderr
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert any(line["level"] == "warning" and "runs on the CPU" in line["message"] for line in lines)


def test_a_memory_limit_that_is_too_small_ends_the_container_with_the_kernels_code(images: dict[str, str]) -> None:
    code, _ = until_it_ends("--memory", "40m", "--memory-swap", "40m", images["cpu"])
    assert code == 137


def test_the_cpu_image_is_small_and_the_gpu_images_size_is_shown(images: dict[str, str]) -> None:
    def size(image: str) -> int:
        return int(docker("image", "inspect", "-f", "{{.Size}}", image))

    base = size("python:3.13-slim-trixie")
    for image in images.values():
        layers = docker("history", "--format", "{{.Size}}", image).splitlines()
        print(f"{image}: {(size(image) - base) / 1e6:.0f} MB over the base; layers: {', '.join(layers)}")
    assert size(images["cpu"]) - base <= 450e6


@pytest.mark.parametrize("runtime", ["cpu", "gpu"])
def test_the_image_holds_what_runs_and_nothing_else(images: dict[str, str], runtime: str) -> None:
    program = """
for tool in gcc cc g++ c++ clang make ld; do command -v $tool; done
find / -xdev \\( -path /proc -o -path /sys \\) -prune -o \\
  \\( -type d \\( -name tests -path '/opt/*' -o -name .git -o -name 'torch*' -o -path '*/.cache/pip' \\) \\
  -o -type f \\( -name '.env' -o -name '*.pem' -path '/app/*' -o -name '*.whl' -path '/opt/*' \\) \\) -print
ls /app
"""
    found = docker("run", "--rm", "--user", "0", "--entrypoint", "sh", images[runtime], "-c", program).split()
    assert found == ["LICENSE", "model", "ready.py", "retinaserve-0.2.0.dist-info", "service"]
    config = json.loads(docker("image", "inspect", images[runtime]))[0]["Config"]
    known = (
        "PATH=",
        "GLIBC_TUNABLES=",
        "PYTHON",
        "HOME=",
        "RETINASERVE_",
        "NVIDIA_",
        "SSL_CERT_FILE=",
        "LANG=",
        "GPG_KEY=",
    )
    assert [variable for variable in config["Env"] if not variable.startswith(known)] == []
    assert config["User"] == "10001:10001"


VARIANTS = {
    (): [["0"]],
    ("cpu",): [],
    ("gpus",): [["0"], ["1"]],
    ("tls", "alerting", "logs"): [["0"]],
    ("cpu", "canary"): [],
}
"""Overlays, and the GPUs that the project then takes."""


@pytest.mark.parametrize("overlays", VARIANTS, ids=lambda overlays: "+".join(overlays) or "plain")
def test_every_variant_of_the_project_is_valid(overlays: tuple[str, ...]) -> None:
    files = ["docker-compose.yml", *(f"docker/{overlay}.yml" for overlay in overlays)]
    options = [option for name in files for option in ("-f", name)]
    environment = os.environ | {"CANARY_MODEL": "/models/second.onnx"}
    project = json.loads(run("docker", "compose", *options, "config", "--format", "json", cwd=ROOT, env=environment))
    services = project["services"]
    for name, service in services.items():
        assert service["restart"] == "unless-stopped", name
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"] is True, name
        assert service["deploy"]["resources"]["limits"].keys() == {"memory", "pids"}, name
        assert service["logging"]["options"], name
    for name in {"prometheus", "grafana", "alertmanager"} & services.keys():
        assert [port["host_ip"] for port in services[name]["ports"]] == ["127.0.0.1"]
    devices = [
        reservation["device_ids"]
        for service in services.values()
        for reservation in service["deploy"]["resources"].get("reservations", {}).get("devices", [])
    ]
    assert devices == VARIANTS[overlays]
