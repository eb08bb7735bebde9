"""The mean of checkpoints: its weights, what it says of itself, and what cannot be averaged."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.networks import tiny_checkpoint
from tests.support.tiny_training import write_tiny_data
from training.__main__ import main
from training.checkpoint import Checkpoint, InvalidCheckpoint, load_checkpoint, save_checkpoint
from training.coco import OBJECT, load_coco
from training.exchange.average import average


@pytest.fixture(scope="module")
def pair() -> tuple[Checkpoint, Checkpoint]:
    """A checkpoint with averaged weights, and one whose weights are 2 more."""
    first = replace(tiny_checkpoint(3, lively=False), step=10, ap=0.5)
    others = {name: value + 2 for name, value in first.best_weights.items()}
    return first, replace(first, model={name: value * 0 for name, value in others.items()}, ema=others, step=20)


def test_each_weight_is_the_mean_of_the_best_weights_and_counters_are_the_first_ones(
    pair: tuple[Checkpoint, Checkpoint],
) -> None:
    mean = average(pair, {"command": "average"})
    for name, value in pair[0].best_weights.items():
        expected = value + 1 if value.is_floating_point() else value
        torch.testing.assert_close(mean.model[name], expected, rtol=0, atol=1e-6)
    assert mean.ema is None
    assert (mean.step, mean.ap, mean.suggested_score_threshold) == (30, None, None)
    assert mean.training is not None
    assert mean.training["command"] == "average"
    assert mean.training["started_from"].count("steps") == 2


def test_other_classes_and_a_single_checkpoint_are_refused(pair: tuple[Checkpoint, Checkpoint]) -> None:
    with pytest.raises(InvalidCheckpoint, match="two checkpoints or more"):
        average(pair[:1], {})
    fewer = replace(pair[1], labels=pair[1].labels[:2])
    with pytest.raises(InvalidCheckpoint, match="classes differ"):
        average([pair[0], fewer], {})
    other = replace(pair[1].config, model=replace(pair[1].config.model, head_convs=7))
    with pytest.raises(InvalidCheckpoint, match="network differ"):
        average([pair[0], replace(pair[1], config=other)], {})


def test_the_command_writes_a_checkpoint_with_its_ap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_tiny_data(tmp_path / "data")
    labels = load_coco(data, "val").labels
    made = replace(tiny_checkpoint(len(labels), lively=False), labels=labels)
    files = [tmp_path / name for name in ("a.pt", "b.pt")]
    for file in files:
        save_checkpoint(made, file)
    arguments = ["average", *map(str, files), "--data", str(data), "--out", str(tmp_path / "c" / "mean.pt")]
    assert main([*arguments, "--device", "cpu"]) == 0
    mean = load_checkpoint(tmp_path / "c" / "mean.pt")
    assert mean.ap is not None
    assert f"AP {mean.ap:.4f}" in capsys.readouterr().out
    assert mean.data_set == "data"
    assert main(["average", str(files[0]), "--data", str(data), "--out", str(tmp_path / "d.pt")]) == 2
    assert not (tmp_path / "d.pt").exists()


def test_proposals_are_evaluated_as_such(tmp_path: Path) -> None:
    made = replace(tiny_checkpoint(1, lively=False), labels=(OBJECT,))
    made = replace(made, config=replace(made.config, class_agnostic=True))
    save_checkpoint(made, tmp_path / "a.pt")
    arguments = ["average", str(tmp_path / "a.pt"), str(tmp_path / "a.pt"), "--out", str(tmp_path / "b.pt")]
    assert main([*arguments, "--data", str(write_tiny_data(tmp_path / "data")), "--device", "cpu"]) == 0
    assert load_checkpoint(tmp_path / "b.pt").ap is not None
