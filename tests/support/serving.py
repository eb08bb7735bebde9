"""Servers for tests: a real process on an .onnx file, or uvicorn in this process around a detector written by hand.

with server_process(tmp_path, "--queue-capacity", "4") as server: httpx.get(server.url + "/readyz")
with serving(FakeDetector(seconds=0.2), queue_capacity=4) as server: ...
"""

import asyncio
import atexit
import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
from PIL import Image
from prometheus_client import CollectorRegistry

from model.detector import Detector
from model.metadata import AnchorConfig, Label, ModelMetadata, ResizePolicy
from model.types import Candidates, CanvasImage
from service.__main__ import Server, build_service, uvicorn_config
from service.api.errors import PROBLEM_TYPES
from service.api.schemas import Problem
from service.api.service import Service
from service.config import Settings
from service.core.decoders import Decoders
from service.metrics import DecoderMetrics
from tests.support.tiny_model import write_tiny_model

PNG = {"Content-Type": "image/png"}
FAULT = "RELIABILITY_FAULT"
"""In the environment: servers of tests are builds with this fault of `tests.support.faulty_service`."""
START_SECONDS = 60
"""On a machine that others keep busy; a quiet one needs two."""
SMALL = ResizePolicy(shorter_side=64, longest_side=128, divisor=32)


def picture(
    width: int = 80, height: int = 64, colour: tuple[int, int, int] = (200, 30, 60), kind: str = "PNG"
) -> bytes:
    """An encoded picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, kind)
    return buffer.getvalue()


@dataclass
class FakeDetector:
    """Finds one box over the whole picture, of label 1, that scores the picture's mean red. Slow or faulty if told."""

    name: str = "fake"
    seconds: float = 0.0
    fault: Callable[[Sequence[CanvasImage]], None] = lambda canvases: None
    """Called with each batch; raises to fail it."""
    gate: threading.Event = field(default_factory=threading.Event)
    """Runs wait while it is not set."""
    batches: list[int] = field(default_factory=list)
    labels: tuple[Label, ...] = (Label(1, "circle"), Label(2, "square"))
    provider: str = "CPUExecutionProvider"
    device_requested: str = "auto"
    fell_back: bool = False
    tf32: bool = False
    sha256: str = "0" * 64
    lanes: int = 1
    """Number of lanes; if there are several, they are shared under concurrent load, as on a CPU."""
    batch_size: int = 1
    shared: list[bool] = field(default_factory=list)
    """True for each run on a shared lane."""

    def __post_init__(self) -> None:
        self.gate.set()
        self.taken: list[FakeLane] = []
        self.lane_freed: Callable[[], None] = lambda: None
        self.metadata = ModelMetadata(
            self.name,
            self.labels,
            "none",
            resize=SMALL,
            anchors=AnchorConfig((20, 40)),
            suggested_score_threshold=0.375,
        )

    def warm_up(self, max_batch_size: int = 1) -> None:
        pass

    def when_lane_freed(self, call: Callable[[], None]) -> None:
        self.lane_freed = call

    def free_lane(self, canvas_size: tuple[int, int], count: int, *, concurrent: bool) -> "FakeLane | None":
        shared = concurrent and self.lanes > 1
        if self.taken and not (shared and all(lane.shared for lane in self.taken) and len(self.taken) < self.lanes):
            return None
        self.taken.append(FakeLane(shared, self))
        return self.taken[-1]

    def run(self, canvases: Sequence[CanvasImage], lane: "FakeLane | None" = None) -> list[Candidates]:
        try:
            self.shared.append(lane is not None and lane.shared)
            self.gate.wait()
            time.sleep(self.seconds)
            self.batches.append(len(canvases))
            self.fault(canvases)
            return [self._candidates(canvas) for canvas in canvases]
        finally:
            if lane is not None:
                self.taken.remove(lane)

    def _candidates(self, canvas: CanvasImage) -> Candidates:
        height, width = canvas.size
        score = canvas.pixels[:height, :width, 0].mean() / 255
        boxes = np.array([[0, 0, width, height], [0, 0, 0, 0]], np.float32)
        return Candidates(boxes, np.array([score, -1], np.float32), np.array([1, 0], np.int64))


@dataclass(eq=False)
class FakeLane:
    shared: bool
    detector: FakeDetector

    def free(self) -> None:
        """End a run that was not the line's, or was never made."""
        self.detector.taken.remove(self)
        self.detector.lane_freed()


@dataclass
class Serving:
    url: str
    service: Service
    detector: FakeDetector | Detector
    client: httpx.Client
    """Knows the URL; one for all threads (making one takes 0.1 s)."""
    models: list[FakeDetector | Detector]
    """The last is opened by the next reload."""

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value; fails where there is no such series."""
        value = self.service.metrics.registry.get_sample_value(name, labels)
        assert value is not None, f"no series {name}{labels}"
        return value

    def wait_until(self, condition: Callable[[], bool]) -> None:
        wait_until(condition)


@functools.cache
def decoders() -> Decoders:
    """Return the decoders that all services of this process share: starting them takes half a second."""
    shared = Decoders(2, DecoderMetrics(CollectorRegistry()))
    shared.start()
    atexit.register(shared.close)
    return shared


@contextlib.contextmanager
def serving(detector: FakeDetector | Detector, **settings: object) -> Iterator[Serving]:
    """uvicorn on a free port of this process, around a detector of yours."""
    given = {"model": Path("fake.onnx"), "model_poll_seconds": 0, "runs_at_once": 1, "decode_threads": 2} | settings
    settings_ = Settings(**given)  # type: ignore[arg-type]
    models = [detector]
    service = build_service(settings_, lambda path: models[-1], decoders())  # type: ignore[arg-type, return-value]
    service.store.load()
    service.engine.start()
    config = uvicorn_config(service)
    config.host, config.port = "127.0.0.1", 0
    server = Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None), verify=False) as client:
            yield Serving(url, service, detector, client, models)
    finally:
        if isinstance(detector, FakeDetector):
            detector.gate.set()
        server.should_exit = True
        thread.join(START_SECONDS)
        assert not thread.is_alive()
        assert service.engine.close()


def assert_problem(response: httpx.Response, status: int, code: str) -> Problem:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = Problem.model_validate(response.json())
    assert (problem.code, problem.status, problem.title) == (code, status, PROBLEM_TYPES[code].title)
    assert problem.request_id == response.headers["x-request-id"]
    return problem


@dataclass
class ServerProcess:
    url: str
    process: subprocess.Popen[bytes]
    log_path: Path
    model_path: Path

    def log(self) -> list[dict[str, object]]:
        """The JSON lines so far."""
        return [json.loads(line) for line in self.log_path.read_text().splitlines() if line.startswith("{")]


def detect(server: Serving | ServerProcess, **request: object) -> httpx.Response:
    """POST /detect with httpx's arguments; a PNG where they have no body."""
    if not request.keys() & {"content", "data", "files", "json"}:
        request = {"content": picture(), "headers": PNG} | request
    if isinstance(server, ServerProcess):
        return httpx.post(server.url + "/detect", verify=False, **request)  # type: ignore[arg-type]
    return server.client.post("/detect", **request)  # type: ignore[arg-type]


def build(*names: str) -> Sequence[str]:
    """The service, or the build with these and the fault that the environment names."""
    faults = ",".join(filter(None, [os.environ.get(FAULT), *names]))
    return ("-m", "tests.support.faulty_service", faults) if faults else ("-m", "service")


@contextlib.contextmanager
def server_process(
    folder: Path,
    *flags: str,
    model_path: Path | None = None,
    ready: bool = True,
    environment: dict[str, str] | None = None,
    program: Sequence[str] | None = None,
) -> Iterator[ServerProcess]:
    """`python -m service` on a free port, on a tiny model unless another is given. Killed at the end."""
    if model_path is None:
        model_path = folder / "tiny.onnx"
        write_tiny_model(model_path)
    log_path = Path(tempfile.mkstemp(".log", dir=folder)[1])
    command = [
        sys.executable,
        *(program or build()),
        "--model",
        str(model_path),
        "--port",
        "0",
        "--log-format",
        "json",
        *flags,
    ]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}))
    server = ServerProcess("", process, log_path, model_path)
    try:
        wait_until(lambda: process.poll() is not None or bool(_url(server)))
        assert process.poll() is None, log_path.read_text()
        server.url = _url(server)
        if ready:
            wait_until(lambda: process.poll() is not None or _is_ready(server.url))
            assert process.poll() is None, log_path.read_text()
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def wait_until(condition: Callable[[], bool], seconds: float = START_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)


def _url(server: ServerProcess) -> str:
    prefix = "listening on "
    messages = (str(line["message"]) for line in server.log())
    return next((message.removeprefix(prefix) for message in messages if message.startswith(prefix)), "")


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(url + "/readyz", verify=False).status_code == 200
    except httpx.TransportError:
        return False
