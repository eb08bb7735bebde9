"""From a checkpoint to a network of other classes: what is kept, what is fresh, what is refused, what stays frozen."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.metadata import Label
from model.retinanet import RetinaNet, prior_bias
from tests.support.networks import TINY, tiny_checkpoint
from tests.support.tiny_training import write_tiny_data
from training.__main__ import main
from training.checkpoint import Checkpoint, InvalidCheckpoint, load_checkpoint, save_checkpoint
from training.config import OptimiserConfig, TrainConfig
from training.exchange.finetune import (
    LOGITS,
    Transfer,
    backbone_stages,
    fine_tuning_config,
    freeze_stages,
    lineage,
    transfer,
)
from training.optimiser import build_optimiser, set_train_mode
from training.presets import PRESETS

CELL = TINY.anchors.per_cell
NEW = (Label(5, "thing 2"), Label(6, "bird"), Label(9, "thing 0"), Label(11, "fish"))


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """A checkpoint of the classes thing 0, thing 1, thing 2."""
    return tiny_checkpoint(3, lively=False)


def transferred(checkpoint: Checkpoint, labels: tuple[Label, ...]) -> tuple[RetinaNet, Transfer]:
    torch.manual_seed(1)
    network = RetinaNet(TINY, len(labels))
    return network, transfer(network, checkpoint, labels)


def test_every_weight_but_the_classification_layers_is_kept(checkpoint: Checkpoint) -> None:
    network, report = transferred(checkpoint, NEW)
    state = network.state_dict()
    for name, value in checkpoint.model.items():
        assert name in LOGITS or torch.equal(state[name], value), name
    assert report.tensors_kept == len(checkpoint.model) - 2


def test_shared_classes_keep_their_columns_and_others_start_with_the_prior(checkpoint: Checkpoint) -> None:
    network, report = transferred(checkpoint, NEW)
    weight, bias = (network.state_dict()[name].unflatten(0, (CELL, 4)) for name in LOGITS)
    old_weight, old_bias = (checkpoint.model[name].unflatten(0, (CELL, 3)) for name in LOGITS)
    assert torch.equal(weight[:, [0, 2]], old_weight[:, [2, 0]])
    assert torch.equal(bias[:, [0, 2]], old_bias[:, [2, 0]])
    assert bias[:, [1, 3]].flatten().tolist() == pytest.approx([prior_bias(0.01)] * 2 * CELL)
    assert weight[:, [1, 3]].std().item() == pytest.approx(0.01, rel=0.1)
    assert (report.kept, report.fresh, report.dropped) == (("thing 2", "thing 0"), ("bird", "fish"), ("thing 1",))
    assert "2 (thing 2, thing 0) kept, 2 (bird, fish) new with the prior, 1 (thing 1) dropped" in str(report)


def test_with_other_classes_only_the_whole_layer_is_fresh(checkpoint: Checkpoint) -> None:
    network, report = transferred(checkpoint, (Label(1, "bird"),))
    assert network.state_dict()[LOGITS[1]].tolist() == pytest.approx([prior_bias(0.01)] * CELL)
    assert report.kept == ()


def test_with_the_same_classes_nothing_is_fresh(checkpoint: Checkpoint) -> None:
    network, report = transferred(checkpoint, checkpoint.labels)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in checkpoint.model.items())
    assert report.fresh == report.dropped == ()


def test_the_moving_average_is_what_training_starts_from(checkpoint: Checkpoint) -> None:
    averaged = {name: value + 1 for name, value in checkpoint.model.items()}
    network, _ = transferred(replace(checkpoint, ema=averaged), checkpoint.labels)
    assert torch.equal(network.state_dict()[LOGITS[1]], averaged[LOGITS[1]])


def test_a_checkpoint_tells_how_all_that_it_started_from_was_made(checkpoint: Checkpoint) -> None:
    first = replace(checkpoint, step=40, training={"command": "train --steps 40", "commit": "abc"})
    second = replace(first, step=7, training={"command": "train --init a.pt", "started_from": lineage(first)})
    assert lineage(second) == ("train --init a.pt (commit unknown, 7 steps) <- train --steps 40 (commit abc, 40 steps)")
    imported = replace(checkpoint, step=0, training={"imported": "weights.pth (retinanet_resnet50_fpn)"})
    assert lineage(imported).startswith("weights.pth (retinanet_resnet50_fpn) (commit unknown")


def test_the_architecture_is_the_checkpoints_and_all_else_the_presets(checkpoint: Checkpoint) -> None:
    config = fine_tuning_config(checkpoint, PRESETS["paper"], {"base_sizes": (8, 16, 32, 64, 128), "steps": 7})
    assert config.model == replace(TINY, anchors=replace(TINY.anchors, base_sizes=(8, 16, 32, 64, 128)))
    assert config.optimiser == PRESETS["paper"].optimiser
    assert (config.steps, config.pretrained_backbone) == (7, False)


def test_weights_that_do_not_fit_are_refused_in_one_line(checkpoint: Checkpoint) -> None:
    network = RetinaNet(replace(TINY, head_channels=24), 3)
    with pytest.raises(InvalidCheckpoint, match=r"conv\.0\.0\.weight is .* there and .* here, and \d+ more") as caught:
        transfer(network, checkpoint, checkpoint.labels)
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidCheckpoint, match="do not fit"):
        transfer(RetinaNet(replace(TINY, anchors=replace(TINY.anchors, scales=(1,))), 3), checkpoint, checkpoint.labels)


def test_frozen_stages_do_not_move_in_a_step_and_all_others_do(checkpoint: Checkpoint) -> None:
    config = TrainConfig(model=TINY, freeze_stages=2, optimiser=OptimiserConfig(optimiser="adamw"))
    network, _ = transferred(checkpoint, checkpoint.labels)
    freeze_stages(network, 2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimiser = build_optimiser(network, config.optimiser)
    set_train_mode(network, frozen_stages=config.freeze_stages, frozen_batch_norm=False)
    outputs = network(torch.randn(2, 3, 64, 64))
    sum(level.square().sum() for level in [*outputs.cls_logits, *outputs.bbox_regression]).backward()  # type: ignore[union-attr]
    optimiser.step()
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    fixed = {
        name for name in before if name.startswith(("backbone.body.conv1", "backbone.body.bn1", "backbone.body.layer1"))
    }
    assert len(fixed) > 10
    assert not moved & fixed
    weights = {name for name, parameter in network.named_parameters() if name not in fixed}
    statistics = {name for name in before if name not in fixed and name.endswith("running_mean")}
    assert moved >= weights | statistics


@pytest.mark.parametrize(("backbone", "width"), [("resnet18", 0.25), ("mobilenet_v3_large", 0.35)])
def test_a_backbone_has_a_stem_and_four_stages(backbone: str, width: float) -> None:
    network = RetinaNet(replace(TINY, backbone=backbone, backbone_width=width), 1)
    stages = backbone_stages(network.backbone.body)
    sides = [64]
    features = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        for stage in stages:
            for module in stage:
                features = module.eval()(features)
            sides.append(features.shape[-1])
    assert sides[2:] == [16, 8, 4, 2]
    assert np.sum([len(stage) for stage in stages]) == len(list(network.backbone.body.children()))
    with pytest.raises(ValueError, match="has 5 stages, stem included; 6 cannot be frozen"):
        freeze_stages(network, 6)


def test_the_command_line_starts_from_a_checkpoint_and_refuses_what_does_not_fit(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = write_tiny_data(tmp_path / "data")
    labels = (Label(1, "cat"), Label(3, "box"), Label(5, "dog"))
    save_checkpoint(replace(checkpoint, labels=labels), tmp_path / "start.pt")
    sizes = "--shorter-side 64 --longest-side 96 --shorter-sides 64 --batch-size 1"
    command = f"train --data {data} --init {tmp_path / 'start.pt'} --workers 0 --steps 1 {sizes}".split()
    assert main([*command, "--out", str(tmp_path / "run"), "--learning-rate", "0"]) == 0
    assert "1 (box) kept, 1 (other) new with the prior, 2 (cat, dog) dropped" in caplog.text
    trained = load_checkpoint(tmp_path / "run" / "last.pt")
    assert [label.label for label in trained.labels] == ["box", "other"]
    assert trained.config.model == TINY
    weights = [name for name, _ in RetinaNet(TINY, 1).named_parameters() if name not in LOGITS]
    assert all(torch.equal(trained.model[name], checkpoint.model[name]) for name in weights)

    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "other"), "--head-channels", "24"]) == 2
    message = capsys.readouterr().err
    assert "the checkpoint's weights do not fit the network: head." in message
    assert message.count("\n") == 1
