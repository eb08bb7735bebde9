"""Alerts against recorded series: each injected fault fires its alert and no other, and with none no alert fires.

The service is scraped a few times a second, and each scrape stands for 15 seconds in promtool's clock, since the rules
look at minutes. Their thresholds are ratios, counts and states, which that changes nothing of.
"""

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tests.reliability.gate import Figures, Work
from tests.support.faulty_models import write_hanging_model
from tests.support.load import Scrape, ask, connected, request_head
from tests.support.serving import ServerProcess, picture, server_process, wait_until
from tests.support.tiny_model import write_tiny_model
from tests.system.test_soak import IMAGE

RULES = Path(__file__).parents[2] / "docker" / "prometheus" / "rules.yml"
SCRAPES, EVERY_SECONDS, STANDS_FOR_SECONDS = 40, 0.02, 15
PLACES = 8
TARGET = {"job": "retinaserve", "instance": "a:8000"}
WHITE = picture(colour=(255, 255, 255))
Fault = Callable[[ServerProcess], object]


@dataclass
class Recording:
    """The series of a server: each value, or None where it did not answer."""

    series: dict[tuple[str, tuple[tuple[str, str], ...]], list[float | None]] = field(default_factory=dict)
    scrapes: int = 0

    def take(self, server: ServerProcess) -> None:
        samples = {} if server.process.poll() is not None else Scrape(server.url).samples
        samples = samples | {("up", ()): float(bool(samples))}
        for sample in {*self.series, *samples}:
            known = self.series.setdefault(sample, [None] * self.scrapes)
            known.append(samples.get(sample))
        self.scrapes += 1

    def as_input(self) -> list[dict[str, str]]:
        """Write it as promtool's tests take it."""
        return [
            {
                "series": f"{name}{{{', '.join(f'{key}={text!r}' for key, text in (dict(labels) | TARGET).items())}}}",
                "values": " ".join("_" if value is None else f"{value:.15g}" for value in values),
            }
            for (name, labels), values in self.series.items()
        ]


def send(server: ServerProcess, image: bytes, count: int = 1) -> None:
    for _ in range(count):
        ask(server.url, body=image)


def spoil_the_model(server: ServerProcess) -> None:
    server.model_path.write_bytes(server.model_path.read_bytes()[:1000])
    server.process.send_signal(signal.SIGHUP)


def kill(server: ServerProcess) -> None:
    server.process.kill()
    server.process.wait()


def hang(server: ServerProcess) -> None:
    send(server, WHITE)
    wait_until(lambda: ask(server.url, "/readyz", method="GET").status == 503)


def fill_the_queue(server: ServerProcess) -> None:
    """Leave pictures in line behind one that hangs; their clients wait."""
    for _ in range(PLACES):
        waiting.append(connected(server.url))
        waiting[-1].sendall(request_head(len(WHITE)) + WHITE)


waiting: list[socket.socket] = []


def write_raising_model(path: Path) -> None:
    write_tiny_model(path, fail_on_white=True)


@dataclass(frozen=True)
class Case:
    fires: frozenset[str]
    inject: Fault = lambda server: None
    write: Callable[[Path], object] = write_tiny_model
    flags: tuple[str, ...] = ()


CASES: Mapping[str, Case] = {
    "no fault": Case(frozenset()),
    "a spoilt model file": Case(frozenset({"RetinaserveReloadFailed"}), spoil_the_model),
    "a killed replica": Case(frozenset({"RetinaserveDown"}), kill),
    "a model that fails": Case(
        frozenset({"RetinaserveDeviceErrors", "RetinaserveErrorBudgetBurn"}),
        lambda server: send(server, WHITE, 20),
        write_raising_model,
    ),
    "an inference that hangs": Case(
        frozenset({"RetinaserveNotReady"}),
        hang,
        write_hanging_model,
        ("--request-timeout-seconds", "3"),
    ),
    "a full queue": Case(
        frozenset({"RetinaserveQueueFilling"}),
        fill_the_queue,
        write_hanging_model,
        ("--queue-capacity", str(PLACES), "--request-timeout-seconds", "1000"),
    ),
}


def record(folder: Path, case: Case) -> Recording:
    """Scrape a server that serves good and bad requests; a third of the way the fault is put in."""
    case.write(folder / "model.onnx")
    recording = Recording()
    with server_process(folder, "--threads", "1", *case.flags, model_path=folder / "model.onnx") as server:
        for number in range(SCRAPES):
            if number < SCRAPES // 3:
                send(server, IMAGE, 3)
                send(server, b"no image")
            if number == SCRAPES // 3:
                case.inject(server)
            recording.take(server)
            time.sleep(EVERY_SECONDS)
    return recording


def firing(folder: Path, recording: Recording, expected: frozenset[str]) -> str:
    """Have promtool say whether these alerts, and no others, fire at some time; its complaint, or nothing."""
    shutil.copy(RULES, folder / "rules.yml")
    minutes = recording.scrapes * STANDS_FOR_SECONDS // 60
    fired = f"count by (alertname) (max_over_time(ALERTS{{alertstate='firing', alertname!='Watchdog'}}[{minutes}m]))"
    samples = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(expected)]
    test = {
        "interval": f"{STANDS_FOR_SECONDS}s",
        "input_series": recording.as_input(),
        "promql_expr_test": [{"expr": fired, "eval_time": f"{minutes}m", "exp_samples": samples}],
    }
    tests = {"rule_files": ["rules.yml"], "evaluation_interval": f"{STANDS_FOR_SECONDS}s", "tests": [test]}
    (folder / "test.yml").write_text(yaml.safe_dump(tests))
    done = subprocess.run(
        ["promtool", "test", "rules", "test.yml"], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr if done.returncode else ""


def run(work: Work) -> Figures:
    """Take the cases in turn."""
    fired = 0
    for name, case in [
        list(CASES.items())[number % len(CASES)] for number in range(work.first, work.first + work.count)
    ]:
        complaint = firing(work.folder, record(work.folder, case), case.fires)
        assert not complaint, f"{name}: {complaint}"
        fired += len(case.fires)
    return {"cases": work.count, "alerts_that_fired": fired}


def missing() -> str:
    return "" if shutil.which("promtool") else "needs promtool, from Debian's package prometheus"
