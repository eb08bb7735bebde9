"""Waiting for batches has an end: workers that die, cannot allocate, fail or hang; and nothing needs shared memory."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch

from model.types import Pixels
from tests.support.orders import negative_or_worse
from tests.support.tiny_training import TINY, environment, train_command, train_here, write_tiny_data
from training import workers
from training.checkpoint import load_checkpoint
from training.coco import CocoDataSet, InvalidDataSet, load_coco
from training.data import load_batches
from training.stopping import StopRequest, Terminated
from training.transforms import Batch, TensorTarget
from training.workers import WorkerLost, made_in_order


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("order", "kind", "message"),
    [
        (
            7,
            WorkerLost,
            r"\(pid \d+\) was killed by signal 9, as the kernel does where memory is short; fewer --workers",
        ),
        (8, WorkerLost, "cannot allocate memory; fewer --workers"),
        (9, RuntimeError, "failed: KeyError: 'strange'"),
        (10, InvalidDataSet, r"10\.png cannot be read"),
    ],
)
def test_what_befalls_a_worker_is_told_when_its_turn_comes(order: int, kind: type[Exception], message: str) -> None:
    made = made_in_order(negative_or_worse, [1, 2, 3, order, 5], workers=2)
    assert [next(made) for _ in range(3)] == [-1, -2, -3]
    with pytest.raises(kind, match=message):
        next(made)
    assert not multiprocessing.active_children()


def test_a_worker_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(made_in_order(negative_or_worse, [1, 11], workers=1)) as made:
        assert next(made) == -1
        monkeypatch.setattr(workers, "LONGEST_WAIT", 0.2)
        with pytest.raises(WorkerLost, match=r"no batch came within 0\.2 s"):
            next(made)
    assert not multiprocessing.active_children()


def test_sigterm_is_heeded_while_a_worker_hangs() -> None:
    made = made_in_order(negative_or_worse, [1, 11], workers=1)
    with StopRequest().heeded() as stop, stop.at_once():
        assert next(made) == -1
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        with pytest.raises(Terminated):
            next(made)
    timer.join()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_workers_make_the_batches_that_this_process_would(data: Path) -> None:
    training_set = load_coco(data, "train")
    here, there = (load_batches(training_set, replace(TINY, steps=3), first_step=0, workers=n) for n in (0, 2))
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.sizes, other.sizes)
        for target, same in zip(one.targets, other.targets, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(vars(target).values(), vars(same).values(), strict=True))


def test_a_batch_takes_no_shared_memory() -> None:
    target = TensorTarget(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), torch.zeros(0, 4))
    batch = Batch(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), torch.tensor([[32, 32]]), [target], ("a",))
    pickled = bytes(ForkingPickler.dumps(batch))  # what a pipe to another process carries
    assert b"rebuild_storage" not in pickled and b"rebuild_tensor" not in pickled
    assert len(pickled) > 32 * 32 * 3


class HangingSet(CocoDataSet):
    """In the third step its pictures are on a file system that no longer answers, and SIGTERM comes."""

    reads = 0

    def read(self, index: int) -> Pixels:
        HangingSet.reads += 1
        if HangingSet.reads > 2 * TINY.batch_size:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait()
        return super().read(index)


def test_a_run_that_waits_for_data_heeds_sigterm_and_keeps_its_last_step(data: Path, tmp_path: Path) -> None:
    hanging = HangingSet(**vars(load_coco(data, "train")))
    with pytest.raises(Terminated, match=r"stopped after step 2; --resume continues"):
        train_here(replace(TINY, checkpoint_every=100), data, tmp_path / "run", training_set=hanging)
    assert load_checkpoint(tmp_path / "run" / "last.pt").step == 2


def can_mount() -> bool:
    return (
        subprocess.run(
            ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True, check=False
        ).returncode
        == 0
    )


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or not can_mount(), reason="may not make a /dev/shm of its own (unshare -m)"
)
def test_a_run_with_workers_needs_next_to_no_shared_memory(data: Path, tmp_path: Path) -> None:
    command = [*train_command(replace(TINY, steps=2), data, tmp_path / "run"), "--workers", "2"]
    mount = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", mount, "bash", *command],
        env=environment(), capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(tmp_path / "run" / "last.pt").step == 2


def test_a_generator_that_is_not_exhausted_leaves_no_process() -> None:
    made: Generator[int, None, None] = made_in_order(negative_or_worse, range(7), workers=2)
    assert next(made) == 0
    assert len(multiprocessing.active_children()) == 2
    made.close()
    assert not multiprocessing.active_children()
    assert np.array_equal(list(made), [])
