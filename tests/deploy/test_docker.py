"""The images and Compose files on a real engine: start, answers, rollouts, failures, hardening. For `make docker-test`.

A clean checkout of HEAD is built and started under a project name and ports of its own, and removed at the end. Grafana
is not started: test_grafana.py asks the dashboard's queries. Needs git, and an engine with the base images.
"""

import functools
import http.client
import json
import os
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from tests.deploy.test_grafana import free_port
from tests.support.serving import picture, wait_until
from tests.support.tiny_model import write_tiny_model

ROOT = Path(__file__).parents[2]
MIB = 1024 * 1024
PNG = {"Content-Type": "image/png"}


def why_not_run() -> str:
    if os.environ.get("DOCKER_TEST") != "1":
        return "run by `make docker-test`"
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        return "no Docker engine answers"
    return ""


pytestmark = [pytest.mark.skipif(bool(why_not_run()), reason=why_not_run()), pytest.mark.slow, pytest.mark.timeout(900)]


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

    files = ("-f", "docker-compose.yml", "-f", "docker/cpu.yml")

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
        return run("docker", "compose", *self.files, *arguments, cwd=self.folder, env=self.environment)

    def roll(self) -> None:
        run("docker/roll.sh", *self.files, cwd=self.folder, env=self.environment)

    def start(self, replicas: int) -> None:
        self.compose(
            "up", "--detach", "--no-recreate", "--wait", "--wait-timeout", "60", "--scale", f"service={replicas}",
            "service", "proxy", "prometheus",
        )  # fmt: skip
        wait_until(lambda: self.targets_up() == replicas)

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
    answers: Counter[str] = field(default_factory=Counter)
    """How many answers of each kind: the model's name for a 200, else the status or the broken connection."""

    def __enter__(self) -> Self:
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._post) for _ in range(self.clients)]
        for thread in self._threads:
            thread.start()
        self.wait_for_answers(20)
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _post(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._over.wait(0.01):
                try:
                    answer = client.post(f"{self.url}/detect", content=picture(), headers=PNG)
                    good = answer.status_code == 200
                    self.answers[answer.json()["model"]["name"] if good else str(answer.status_code)] += 1
                except httpx.TransportError as error:
                    self.answers[type(error).__name__] += 1

    def wait_for_answers(self, number: int) -> None:
        wanted = self.answers.total() + number
        wait_until(lambda: self.answers.total() >= wanted)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return folder


@pytest.fixture(scope="module")
def images(checkout: Path) -> dict[str, str]:
    """Both images, built as the README says."""
    names = {runtime: f"retinaserve:{runtime}" for runtime in ("cpu", "gpu")}
    network = os.environ.get("BUILD_NETWORK", "default")
    for runtime, name in names.items():
        options = ["--network", network, "--build-arg", f"RUNTIME={runtime}", "-f", "docker/Dockerfile", "-t", name]
        run("docker", "build", *options, ".", cwd=checkout)
    return names


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two small models, first.onnx and second.onnx."""
    folder = tmp_path_factory.mktemp("models")
    folder.chmod(0o755)
    for name, seed in (("first", 1), ("second", 2)):
        write_tiny_model(folder / f"{name}.onnx", name=name, seed=seed)
    return folder


@pytest.fixture(scope="module")
def stack(checkout: Path, images: dict[str, str], models: Path) -> Iterator[Stack]:
    """The project, with one replica that serves models/current.onnx, which is models/first.onnx."""
    settings = {"RETINASERVE_MODEL": "/models/current.onnx"}
    stack = Stack(checkout, models, free_port(), free_port(), settings)
    stack.point_to("first.onnx")
    try:
        stack.start(1)
        yield stack
    finally:
        stack.compose("down", "--volumes", "--timeout", "5")


def test_a_picture_sent_to_the_proxy_gets_its_boxes(stack: Stack) -> None:
    answer = httpx.post(f"{stack.api}/detect", files={"image": ("a.png", picture(120, 90), "image/png")})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["image"] == {"width": 120, "height": 90}
    assert body["model"]["name"] == "first"
    assert body["detections"][0].keys() == {"label", "class_id", "score", "box"}


@pytest.mark.parametrize("path", ["/metrics", "/metrics/", "/%6detrics", "/metrics?x"])
def test_the_proxy_does_not_show_the_metrics(stack: Stack, path: str) -> None:
    answer = httpx.get(stack.api + path)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


@pytest.mark.parametrize(("path", "size"), [("/detect", 28 * MIB), ("/detect/batch", 256 * MIB)])
def test_the_proxy_refuses_a_body_that_is_too_large_before_it_is_sent(stack: Stack, path: str, size: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", stack.api_port, timeout=10)
    connection.putrequest("POST", path)
    connection.putheader("Content-Length", str(size))
    connection.endheaders()
    answer = connection.getresponse()
    assert (answer.status, json.load(answer)["code"]) == (413, "body_too_large")
    connection.close()


def test_prometheus_scrapes_every_replica_and_fills_the_records(stack: Stack) -> None:
    stack.start(2)
    rules = httpx.get(f"{stack.prometheus}/api/v1/rules").json()["data"]["groups"]
    names = {rule["name"] for group in rules for rule in group["rules"] if rule["type"] == "recording"}
    of_gpus = {"instance:retinaserve_gpu_memory:ratio"}
    with Load(stack.api):
        wait_until(lambda: all(stack.query(name) for name in names - of_gpus), 60)
    assert all(rule["health"] == "ok" for group in rules for rule in group["rules"] if "lastError" in rule)


def test_a_replica_that_is_stopped_loses_no_request(stack: Stack) -> None:
    stack.start(3)
    with Load(stack.api) as load:
        docker("stop", stack.replicas()[0])
        load.wait_for_answers(50)
    assert set(load.answers) == {"first"}


def test_a_replica_that_is_killed_loses_only_what_it_was_working_on(stack: Stack) -> None:
    stack.start(3)
    with Load(stack.api) as load:
        docker("kill", "--signal", "KILL", stack.replicas()[0])
        load.wait_for_answers(50)
    lost = {kind: number for kind, number in load.answers.items() if kind != "first"}
    assert set(lost) <= {"502"}
    assert sum(lost.values()) <= load.clients


def test_replacing_every_replica_loses_no_request(stack: Stack) -> None:
    stack.start(3)
    before = stack.replicas()
    with Load(stack.api) as load:
        stack.roll()
        load.wait_for_answers(50)
    assert set(load.answers) == {"first"}
    assert len(stack.replicas()) == 3
    assert not set(before) & set(stack.replicas())


def test_a_new_model_and_back_lose_no_request(stack: Stack) -> None:
    stack.start(2)
    with Load(stack.api) as load:
        for model, told in (("second", True), ("first", False)):
            stack.point_to(f"{model}.onnx")
            if told:
                stack.compose("kill", "--signal", "HUP", "service")
            for replica in stack.replicas():
                wait_until(functools.partial(stack.serves, replica, model))
            load.wait_for_answers(20)
    assert set(load.answers) == {"first", "second"}
    assert httpx.post(f"{stack.api}/detect", content=picture(), headers=PNG).json()["model"]["name"] == "first"


def test_a_broken_model_changes_nothing(stack: Stack) -> None:
    (stack.models / "broken.onnx").write_bytes(b"no model")
    failures = 'sum(retinaserve_model_reloads_total{outcome="failure"})'
    with Load(stack.api) as load:
        stack.point_to("broken.onnx")
        stack.compose("kill", "--signal", "HUP", "service")
        wait_until(lambda: float(stack.query(failures)[0]["value"][1]) > 0)
        stack.point_to("first.onnx")
    assert set(load.answers) == {"first"}


def test_without_prometheus_the_service_serves_on(stack: Stack) -> None:
    stack.compose("stop", "prometheus")
    with Load(stack.api) as load:
        load.wait_for_answers(50)
    assert set(load.answers) == {"first"}
    stack.start(2)


def test_the_process_may_do_nothing_but_serve(stack: Stack) -> None:
    program = """
import os
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
skipped = ("/proc", "/sys", "/tmp", "/dev/mqueue")  # message queues, no files
folders = [f for f, _, _ in os.walk("/") if not f.startswith(skipped) and os.access(f, os.W_OK)]
print(os.getuid(), int(status["CapEff"], 16), int(status["CapBnd"], 16), int(status["NoNewPrivs"]), folders)
"""
    assert docker("exec", stack.replicas()[0], "python", "-c", program) == "10001 0 0 1 []"


def test_a_full_scratch_disk_is_a_problem_of_one_request_and_passes(stack: Stack) -> None:
    stack.start(1)
    [replica] = stack.replicas()
    large = picture(1600, 1600, kind="BMP")  # over the size up to which a form's file stays in memory

    def post() -> httpx.Response:
        return httpx.post(f"{stack.api}/detect", files={"image": ("a.bmp", large, "image/bmp")})

    fill = ["docker", "exec", replica, "sh", "-c", "cat /dev/zero > /tmp/full"]
    assert "No space left" in subprocess.run(fill, capture_output=True, text=True).stderr
    full = post()
    docker("exec", replica, "rm", "/tmp/full")
    assert full.status_code == 200 or full.headers["content-type"] == "application/problem+json", full.text
    assert post().status_code == 200


def test_with_api_keys_prometheus_shows_its_own(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("for-prometheus\n")
    tmp_path.chmod(0o755)
    keys = {"RETINASERVE_API_KEYS": "for-clients,for-prometheus", "METRICS_KEY_FILE": str(tmp_path / "key")}
    locked = Stack(stack.folder, stack.models, stack.api_port, stack.prometheus_port, stack.settings | keys)
    locked.compose("up", "--detach", "--wait", "--scale", "service=1", "service", "proxy", "prometheus")
    try:
        wait_until(lambda: locked.targets_up() == 1)
        assert httpx.post(f"{stack.api}/detect", content=picture(), headers=PNG).status_code == 401
        with_key = PNG | {"Authorization": "Bearer for-clients"}
        assert httpx.post(f"{stack.api}/detect", content=picture(), headers=with_key).status_code == 200
    finally:
        stack.compose("up", "--detach", "--wait", "--scale", "service=1", "service", "proxy", "prometheus")


def test_down_lets_a_request_in_flight_finish(stack: Stack) -> None:
    stack.start(1)
    image = picture()
    down = threading.Thread(target=stack.compose, args=("down",))

    def body() -> Iterator[bytes]:
        yield image[:10]
        down.start()
        time.sleep(3)
        yield image[10:]

    answer = httpx.post(f"{stack.api}/detect", content=body(), headers=PNG, timeout=30)
    down.join()
    assert answer.status_code == 200, answer.text
    assert stack.replicas() == []


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
    assert found == ["LICENSE", "model", "ready.py", "retinaserve-0.1.0.dist-info", "service"]
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


@pytest.mark.parametrize("files", [(), ("docker/cpu.yml",), ("docker/gpus.yml",)])
def test_every_variant_of_the_project_is_valid(files: tuple[str, ...]) -> None:
    options = [option for name in ("docker-compose.yml", *files) for option in ("-f", name)]
    project = json.loads(run("docker", "compose", *options, "config", "--format", "json", cwd=ROOT))
    services = project["services"]
    for name, service in services.items():
        assert service["restart"] == "unless-stopped", name
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"] is True, name
        assert service["deploy"]["resources"]["limits"].keys() == {"memory", "pids"}, name
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}, name
    for name in ("prometheus", "grafana"):
        assert [port["host_ip"] for port in services[name]["ports"]] == ["127.0.0.1"]
    devices = [
        reservation["device_ids"]
        for service in services.values()
        for reservation in service["deploy"]["resources"].get("reservations", {}).get("devices", [])
    ]
    assert devices == {(): [["0"]], ("docker/cpu.yml",): [], ("docker/gpus.yml",): [["0"], ["1"]]}[files]
