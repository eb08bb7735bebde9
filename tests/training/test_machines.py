"""Two machines by `torchrun --nnodes 2`: two of its agents on this one, each with a worker, that meet at one address.

Gloo and the c10d rendezvous, as docs/training.md has them. Two ranks of one machine are what they are compared with.
"""

import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from tests.support.forked import run_as_ranks
from tests.support.load import free_ports
from tests.support.tiny_training import TINY, environment, train_arguments, train_command, write_tiny_data
from training.checkpoint import load_checkpoint
from training.config import TrainConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # six starts of torch
CONFIG = replace(TINY, steps=20)
FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""As docs/training.md has it: else each agent counts its own restarts, and after one the workers do not meet."""


@contextmanager
def two_machines(config: TrainConfig, data: Path, out: Path, *more: str) -> Iterator[list["subprocess.Popen[str]"]]:
    """The agents, each started by the same line; they and their workers are killed at the end."""
    [port] = free_ports(1)
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "run1")
    torchrun = ("--nnodes", "2", *meeting, "--local-addr", "127.0.0.1", "--max-restarts", "3")
    command = train_command(config, data, out, *more, processes=1, torchrun=torchrun)
    with ExitStack() as started:
        agents = []
        for _ in range(2):
            agents.append(subprocess.Popen(command, env=environment() | FRESH_STORE, stderr=subprocess.PIPE, text=True))
            started.callback(end, agents[-1])
        yield agents


def end(agent: "subprocess.Popen[str]") -> None:
    if agent.poll() is None:
        for process in (*psutil.Process(agent.pid).children(recursive=True), agent):
            process.kill()
    agent.communicate()


def outcomes(agents: list["subprocess.Popen[str]"]) -> str:
    """Wait for both to end well; what they said."""
    said = [agent.communicate(timeout=240)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    return "".join(said)


def assert_same_weights(run: Path, expected: Path) -> None:
    found, wanted = load_checkpoint(run / "last.pt"), load_checkpoint(expected / "last.pt")
    assert found.step == wanted.step == CONFIG.steps
    assert found.ema is not None and wanted.ema is not None
    for weights, reference in ((found.model, wanted.model), (found.ema, wanted.ema)):
        assert weights.keys() == reference.keys()
        assert [name for name, value in weights.items() if not torch.equal(value, reference[name])] == []


def test_two_machines_make_the_weights_of_one_though_a_worker_is_killed_and_restarted(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data")
    with two_machines(CONFIG, data, tmp_path / "run", "--resume") as agents:
        wait_until((tmp_path / "run" / "last.pt").exists, agents)
        workers = [process for agent in agents for process in psutil.Process(agent.pid).children(recursive=True)]
        [victim] = [process for process in workers if process.environ().get("RANK") == "1"]
        victim.send_signal(signal.SIGKILL)
        said = outcomes(agents)
    assert [step for step in re.findall(r"resumed at step (\d+)", said) if 0 < int(step) < CONFIG.steps]
    run_as_ranks(2, train_arguments(CONFIG, data, tmp_path / "one"), tmp_path)
    assert_same_weights(tmp_path / "run", tmp_path / "one")


def wait_until(condition: Callable[[], bool], agents: list["subprocess.Popen[str]"]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert [agent.poll() for agent in agents] == [None, None], "the run ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.01)
