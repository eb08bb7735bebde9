"""Runs of the real command that are killed, stopped, filled up or fed with bad pictures."""

import json
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.forked import begun
from tests.support.tiny_training import TINY, environment, metrics, train_arguments, train_command, write_tiny_data
from training.__main__ import main
from training.checkpoint import load_checkpoint

CONFIG = replace(TINY, steps=24, checkpoint_every=1, evaluate_every=7, log_every=1)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data") / "boxes")


@pytest.fixture(scope="module")
def never_killed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "whole"
    assert main(train_arguments(CONFIG, data, out)) == 0
    return out


def wait_until(condition: Callable[[], bool], has_ended: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert not has_ended(), "the run ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def last_step(out: Path) -> int:
    lines = metrics(out)
    return int(lines[-1]["step"]) if lines else 0


def assert_same_run(one: Path, other: Path) -> None:
    for name in ("last.pt", "best.pt"):
        ours, theirs = load_checkpoint(one / name), load_checkpoint(other / name)
        assert ours.step == theirs.step
        assert ours.ap == theirs.ap
        assert ours.ema is not None and theirs.ema is not None
        for key in theirs.model:
            assert torch.equal(ours.model[key], theirs.model[key]), f"{name}: {key}"
            assert torch.equal(ours.ema[key], theirs.ema[key]), f"{name}: {key} of the average"


def test_killed_at_any_moment_and_resumed_it_ends_with_the_weights_of_a_run_never_killed(
    data: Path, tmp_path: Path, never_killed: Path
) -> None:
    out = tmp_path / "run"
    rng = np.random.default_rng(0)
    for _ in range(3):  # the first start finds no last.pt: --resume begins afresh
        before = last_step(out)
        run = begun(train_arguments(CONFIG, data, out, "--resume"), tmp_path / "said.txt")
        try:
            wait_until(lambda: last_step(out) >= before + 4, lambda: run.exitcode is not None)  # noqa: B023
            time.sleep(float(rng.uniform(0, 0.2)))  # in a step, a checkpoint or an evaluation
        finally:
            run.kill()
            run.join()
    assert load_checkpoint(out / "last.pt").step < CONFIG.steps
    assert main(train_arguments(CONFIG, data, out, "--resume")) == 0
    assert_same_run(out, never_killed)


def test_sigterm_writes_a_checkpoint_and_exits_with_143(data: Path, tmp_path: Path, never_killed: Path) -> None:
    out = tmp_path / "run"
    command = train_command(CONFIG, data, out)
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        wait_until(lambda: last_step(out) >= 3, lambda: run.poll() is not None)
        run.send_signal(signal.SIGTERM)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 143
    assert "--resume continues" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert load_checkpoint(out / "last.pt").step >= 3
    assert main(train_arguments(CONFIG, data, out, "--resume")) == 0
    assert_same_run(out, never_killed)


def test_a_disk_that_is_full_stops_the_run_with_the_cause(data: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the write fails halfway, as it does on a full one."""
    out = tmp_path / "run"
    done = subprocess.run(
        train_command(CONFIG, data, out),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 2
    message = done.stderr.splitlines()[-1]
    assert "last.pt cannot be written: [Errno 27] File too large; there is none before it" in message
    assert "Traceback" not in done.stderr
    assert [file.name for file in out.iterdir() if "pt" in file.name] == []


def test_an_unreadable_picture_stops_the_run_and_is_named_or_is_skipped_and_counted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = write_tiny_data(tmp_path / "data")
    (data / "images" / "train" / "3.png").write_bytes(b"no picture")
    config = replace(CONFIG, steps=4, evaluate_every=0)
    assert main(train_arguments(config, data, tmp_path / "stopped", "--workers", "1")) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "3.png cannot be read" in line and "--unreadable skip" in line
    (data / "images" / "val" / "0.png").unlink()
    config = replace(config, unreadable="skip")
    caplog.clear()
    assert main(train_arguments(config, data, tmp_path / "skipped", "--workers", "1")) == 0
    assert caplog.text.count("3.png cannot be read") == 1
    assert "(1 so far)" in caplog.text
    assert "0.png cannot be read" in caplog.text
    assert metrics(tmp_path / "skipped")[-1]["pictures"] == 2


@pytest.mark.parametrize(
    ("split", "changes", "message"),
    [
        ("train", {"images": []}, "2 categories and 0 images"),
        ("train", {"annotations": []}, "has no objects"),
        ("val", {"categories": [{"id": 2, "name": "box"}, {"id": 5, "name": "new"}]}, "the model knows 2 labels"),
    ],
)
def test_data_that_cannot_be_learnt_from_is_refused_before_the_first_step(
    tmp_path: Path, split: str, changes: dict[str, object], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write_tiny_data(tmp_path / "data")
    file = data / "annotations" / f"instances_{split}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert main(train_arguments(CONFIG, data, tmp_path / "run")) == 2
    assert message in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
