"""Presets, flags and the way a configuration goes into a checkpoint and back."""

import argparse
import json

import pytest

from training.config import TrainConfig, add_flags, from_dict, override, to_dict, with_flags
from training.presets import PRESETS


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


def test_torchvisions_presets_are_its_references() -> None:
    first, second = PRESETS["torchvision-v1"], PRESETS["torchvision-v2"]
    for preset in (first, second):
        assert [round(m * 26) for m in preset.optimiser.milestones] == [16, 22]
        assert (preset.batch_size, preset.optimiser.reference_batch_size, preset.group_by_aspect) == (16, 16, True)
        assert preset.model.anchors.stride == "torchvision"
        assert (preset.loss.normaliser, preset.freeze_stages) == ("image", 2)
    assert (first.optimiser.optimiser, first.optimiser.learning_rate) == ("sgd", 0.01)
    assert (first.loss.box_loss, first.model.p6_from, first.model.backbone_norm) == ("l1", "p5", "frozen")
    assert (second.optimiser.optimiser, second.optimiser.learning_rate) == ("adamw", 1e-4)
    assert (second.optimiser.weight_decay, second.loss.box_loss, second.model.p6_from) == (0.05, "giou", "c5")
    assert (second.model.head_norm, second.model.backbone_norm) == ("group", "batch")
    assert second.augment.shorter_sides[0] == 480 and second.augment.shorter_sides[-1] == 800


def test_detectron2s_preset_is_its_3x_schedule() -> None:
    preset = PRESETS["detectron2-3x"]
    assert preset.steps == 270_000
    assert [round(m * preset.steps) for m in preset.optimiser.milestones] == [210_000, 250_000]
    assert preset.augment.shorter_sides == (640, 672, 704, 736, 768, 800)
    assert (preset.optimiser.warmup_steps, preset.optimiser.learning_rate, preset.batch_size) == (1000, 0.01, 16)
    assert (preset.loss.box_loss, preset.loss.normaliser, preset.model.p6_from) == ("l1", "running", "c5")
    assert preset.freeze_stages == 2


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


def test_a_list_can_be_emptied_and_a_pair_is_two_values(capsys: pytest.CaptureFixture[str]) -> None:
    whole = override(PRESETS["demo"], parsed("--crop-sizes", "--crop-batch-sizes", "--crop-probabilities"))
    assert whole.augment.crop_sizes == whole.augment.crop_batch_sizes == whole.augment.crop_probabilities == ()
    assert override(PRESETS["demo"], parsed("--scale-jitter", "1", "2")).augment.scale_jitter == (1.0, 2.0)
    with pytest.raises(SystemExit):
        parsed("--scale-jitter", "1")
    assert "expected 2 arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "flags", "sides"),
    [
        ("paper", ("--shorter-side", "128", "--longest-side", "224"), (128,)),
        ("torchvision-v2", ("--shorter-side", "400"), tuple(range(240, 401, 16))),
        ("paper", ("--shorter-side", "128", "--longest-side", "224", "--shorter-sides", "96", "160"), (96, 160)),
    ],
)
def test_trainings_shorter_sides_follow_the_one_that_is_served(
    preset: str, flags: tuple[str, ...], sides: tuple[int, ...]
) -> None:
    config = with_flags(PRESETS[preset], parsed(*flags))
    assert config.augment.shorter_sides == sides
    assert config.resize.shorter_side == int(flags[1])


def test_a_shorter_side_beyond_the_longest_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shorter sides \(800,\) exceed the longest side 224"):
        with_flags(PRESETS["paper"], parsed("--shorter-side", "128", "--longest-side", "224", "--shorter-sides", "800"))


def test_without_flags_a_preset_stays_as_it_is() -> None:
    assert override(PRESETS["demo"], parsed()) == PRESETS["demo"]


def test_an_unknown_key_is_an_error() -> None:
    with pytest.raises(ValueError, match="speed"):
        from_dict(TrainConfig, {"speed": 9})


def test_a_value_that_is_no_choice_is_an_error() -> None:
    with pytest.raises(SystemExit):
        parsed("--box-loss", "l3")
