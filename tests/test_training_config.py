"""Presets, flags and the way a configuration goes into a checkpoint and back."""

import argparse
import json

import pytest

from training.config import PRESETS, TrainConfig, add_flags, from_dict, override, to_dict


def parsed(*arguments: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_flags(parser, TrainConfig)
    return vars(parser.parse_args(arguments))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_the_way_through_json(name: str) -> None:
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(PRESETS[name])))) == PRESETS[name]


def test_the_paper_preset_is_the_papers() -> None:
    paper = PRESETS["paper"]
    assert (paper.optimiser.learning_rate, paper.optimiser.momentum, paper.optimiser.weight_decay) == (0.01, 0.9, 1e-4)
    assert [round(m * paper.steps) for m in paper.optimiser.milestones] == [60_000, 80_000]
    assert (paper.steps, paper.batch_size, paper.resize.shorter_side, paper.resize.longest_side) == (
        90_000,
        16,
        800,
        1333,
    )
    assert paper.loss.smooth_l1_beta == pytest.approx(1 / 3**2)


def test_a_flag_overrides_its_value_wherever_it_lives() -> None:
    config = override(
        PRESETS["paper"],
        parsed("--learning-rate", "0.5", "--backbone", "resnet18", "--base-sizes", "8", "16", "--steps", "7"),
    )
    assert config.optimiser.learning_rate == 0.5
    assert config.model.backbone == "resnet18"
    assert config.model.anchors.base_sizes == (8, 16)
    assert config.steps == 7
    assert config.loss == PRESETS["paper"].loss


def test_without_flags_a_preset_stays_as_it_is() -> None:
    assert override(PRESETS["demo"], parsed()) == PRESETS["demo"]


def test_an_unknown_key_is_an_error() -> None:
    with pytest.raises(ValueError, match="speed"):
        from_dict(TrainConfig, {"speed": 9})


def test_a_value_that_is_no_choice_is_an_error() -> None:
    with pytest.raises(SystemExit):
        parsed("--box-loss", "l3")
