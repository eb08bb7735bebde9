"""The comparison with torchvision's RetinaNet compares like with like, and runs."""

from pathlib import Path

import pytest
import torch

from tests.benchmarks.learning import config_of, main, parsed, two_sides
from tests.support.tiny_training import write_tiny_data
from training.coco import load_coco
from training.data import load_batches

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "model" / "pretrained" / "shapes.pt")
FEW = ("--steps", "2", "--batch-size", "2", "--seeds", "1", "--shorter-side", "64", "--threads", "1", "--init", DEMO)


def test_both_sides_learn_the_same_from_the_same_batches(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data")
    config = config_of(parsed(["--data", str(data), *FEW]), seed=0)
    training_set = load_coco(data, "train")
    ours, theirs = two_sides(config, Path(DEMO), len(training_set.labels))
    for step, batch in enumerate(load_batches(training_set, config, first_step=0, workers=0)):
        assert ours.learn(batch, step) == pytest.approx(theirs.learn(batch, step), rel=1e-3), step
    expected = theirs.network.state_dict()
    for name, value in ours.network.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-3, msg=name)


def test_the_table_has_a_row_for_each_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_tiny_data(tmp_path / "data")
    assert main(["--data", str(data), *FEW]) == 0
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split(" | ")[1] for row in rows] == ["ours", "torchvision's"]
