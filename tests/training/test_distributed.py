"""Two processes against one: the same losses, the same AP, and, started by torchrun, an end when one of them dies.

On the CPU, with gloo. Heads and backbone without batch statistics, which each process would have of its own.
"""

import functools
import pickle
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.multiprocessing

from model.metadata import Label, ResizePolicy
from model.types import Candidates, CanvasImage
from tests.support.forked import run_as_ranks
from tests.support.load import free_ports
from tests.support.tiny_training import TINY, environment, metrics, train_arguments, train_command, write_tiny_data
from training.__main__ import main
from training.checkpoint import load_checkpoint
from training.coco import CocoDataSet, load_coco
from training.config import LossConfig, TrainConfig
from training.data import load_batches
from training.distributed import ALONE, Ranks, joined, loading_processes
from training.evaluate import Predictor, evaluate
from training.evaluation.average_precision import ApReport
from training.state import new_state

STEADY = replace(
    TINY,
    model=replace(TINY.model, backbone_norm="frozen"),
    optimiser=replace(TINY.optimiser, optimiser="sgd", learning_rate=1e-3, schedule="steps", gradient_clip=1.0),
    steps=10,
    batch_size=5,
    checkpoint_every=100,
    log_every=1,
)


Losses = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
"""[steps, 2]: classification and box loss of each step."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data") / "boxes", training_pictures=9)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[TrainConfig], tuple[Path, Losses]]:
    """The run folder and the losses of one process, trained once for each config."""

    @functools.cache
    def trained(config: TrainConfig) -> tuple[Path, Losses]:
        out = tmp_path_factory.mktemp("alone") / "run"
        return out, losses_of(config, data, out, processes=1)

    return trained


def losses_of(config: TrainConfig, data: Path, out: Path, *, processes: int) -> Losses:
    """Train in this process (1), or in so many others."""
    arguments = train_arguments(config, data, out)
    if processes == 1:
        assert main(arguments) == 0
    else:
        run_as_ranks(processes, arguments, out.parent)
    lines = [line for line in metrics(out) if "box_loss" in line]
    assert [line["step"] for line in lines] == list(range(1, config.steps + 1))
    return np.array([[line["classification_loss"], line["box_loss"]] for line in lines])


@pytest.mark.slow
@pytest.mark.parametrize(("normaliser", "parts"), [("image", 1), ("batch", 1), ("batch", 2)])
def test_two_processes_have_the_losses_of_one(
    data: Path, tmp_path: Path, alone: Callable[[TrainConfig], tuple[Path, Losses]], normaliser: str, parts: int
) -> None:
    config = replace(STEADY, precision="fp64", loss=LossConfig(normaliser=normaliser))  # type: ignore[arg-type]
    folder, one = alone(config)
    two = losses_of(replace(config, accumulate_steps=parts), data, tmp_path / "two", processes=2)
    np.testing.assert_allclose(two, one, rtol=1e-9)
    weights, expected = (load_checkpoint(run / "last.pt").model for run in (tmp_path / "two", folder))
    for name, value in new_state(config, 2, torch.device("cpu"), ALONE, pretrained=False).network.named_parameters():
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-9, atol=1e-12)
        assert not torch.equal(weights[name], value), f"{name} did not change"


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_in_single_precision(data: Path, tmp_path: Path) -> None:
    one, two = (losses_of(STEADY, data, tmp_path / str(n), processes=n) for n in (1, 2))
    np.testing.assert_allclose(two[0], one[0], rtol=1e-6)
    np.testing.assert_allclose(two, one, rtol=1e-3)
    assert [line["ap"] for line in metrics(tmp_path / "1")[-1:]] == [
        line["ap"] for line in metrics(tmp_path / "2")[-1:]
    ]


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_run_with_a_message(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = replace(STEADY, steps=100_000, checkpoint_every=5)
    with subprocess.Popen(
        train_command(config, data, out, processes=2),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        try:
            wait_until(lambda: (out / "last.pt").exists(), run)
            [victim] = [p for p in psutil.Process(run.pid).children() if p.environ().get("RANK") == "1"]
            victim.send_signal(signal.SIGKILL)
            _, errors = run.communicate(timeout=120)
        finally:
            run.kill()
    assert run.returncode != 0
    assert "rank 0 stops: another process of the run died or hangs" in errors
    assert "--resume continues from last.pt" in errors


def wait_until(condition: Callable[[], bool], run: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert run.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_ranks_share_the_samples_that_one_process_sees(data: Path) -> None:
    training_set = load_coco(data, "train")
    whole = list(load_batches(training_set, STEADY, first_step=0, workers=0))
    shares = [list(load_batches(training_set, STEADY, first_step=0, workers=0, ranks=Ranks(r, 2))) for r in (0, 1)]
    assert len(whole) == STEADY.steps
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [len(part.targets) for part in parts] == [3, 2]
        images = [image for part in parts for image in part.padded_to(batch.canvas).images]
        for number, image in enumerate(batch.images):
            place = number // 2 if number % 2 == 0 else 3 + number // 2
            assert torch.equal(image, images[place])


def test_a_step_too_small_for_the_ranks_is_refused(data: Path) -> None:
    config = replace(STEADY, batch_size=3, accumulate_steps=2)
    with pytest.raises(ValueError, match="a step of 3 images cannot be shared by 2 processes in 2 parts"):
        next(load_batches(load_coco(data, "train"), config, first_step=0, workers=0, ranks=Ranks(0, 2)))


LABELS = (Label(2, "box"), Label(9, "other"))


def nearly_right(data_set: CocoDataSet) -> Predictor:
    """Finds the brightest columns and rows, two pixels off: an AP between 0 and 1 without any training."""

    def run(canvases: list[CanvasImage]) -> list[Candidates]:
        [canvas] = canvases
        bright = canvas.pixels[..., 0] > 200
        rows, columns = bright.any(axis=1).nonzero()[0], bright.any(axis=0).nonzero()[0]
        if not len(rows):
            return [Candidates(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))]
        box = np.array([[columns[0], rows[0], columns[-1] + 3, rows[-1] + 4]], np.float32)
        score = np.array([0.5 + bright.mean() / 2], np.float32)
        return [Candidates(box, score, np.array([2]))]

    return Predictor(run, LABELS, ResizePolicy(shorter_side=64, longest_side=96))  # type: ignore[arg-type]


def evaluate_share(rank: int, data: Path, out: Path, port: int) -> None:
    import os

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    validation_set = load_coco(data, "val")
    with joined(torch.device("cpu")) as ranks:
        report = evaluate(nearly_right(validation_set), validation_set, progress=False, ranks=ranks)
    (out / f"{rank}.pickle").write_bytes(pickle.dumps(report))


@pytest.mark.slow
def test_evaluation_across_ranks_is_that_of_one_process(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data", training_pictures=2, validation_pictures=7)
    validation_set = load_coco(data, "val")
    alone = evaluate(nearly_right(validation_set), validation_set, progress=False)
    assert 0.3 < alone.ap < 0.99
    arguments = (data, tmp_path, *free_ports(1))
    torch.multiprocessing.start_processes(evaluate_share, arguments, nprocs=2, start_method="forkserver")
    reports: list[ApReport] = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in (0, 1)]
    assert repr(reports[0]) == repr(reports[1]) == repr(alone)  # repr: NaN is equal to itself
    assert alone.num_images == 7


@pytest.mark.parametrize(("ranks", "share"), [("1", 1), ("2", 2), ("1000", 1000)])
def test_samples_are_loaded_by_a_ranks_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, ranks: str, share: int
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.setattr("training.distributed.available_cores", lambda: 64)
    assert loading_processes() == max(1, min(16, 64 // share))
