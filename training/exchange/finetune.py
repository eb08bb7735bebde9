"""Fine-tuning: a training that starts from a checkpoint's weights, with the classes of its own data set.

The architecture is the checkpoint's; the preset gives all else. A flag may change what holds no weights, such as the
anchors' sizes; one that does not fit the weights is refused. Every weight is kept but those of the classification
layer's columns: a class keeps its column if the checkpoint knows its name, another starts with the prior, as in a
fresh network. The checkpoint may be one that `python -m training import` made of torchvision's COCO weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from model.metadata import Label
from model.retinanet import RetinaNet
from training.checkpoint import Checkpoint, InvalidCheckpoint
from training.config import TrainConfig, with_flags

LOGITS = ("head.classification_head.cls_logits.weight", "head.classification_head.cls_logits.bias")
BATCH_COUNTER = ".num_batches_tracked"
"""Batch norms count their batches, frozen ones do not; nothing is computed from it."""
NAMED = 5
"""Classes that are told by name before it says how many more there are."""


@dataclass(frozen=True)
class Transfer:
    """The fate of a checkpoint's weights."""

    tensors_kept: int
    kept: tuple[str, ...]
    """Classes whose column of the classification layer was kept."""
    fresh: tuple[str, ...]
    """Classes whose column starts with the prior."""
    dropped: tuple[str, ...]
    """Classes of the checkpoint that the data set has not."""

    def __str__(self) -> str:
        return (
            f"kept {self.tensors_kept} tensors, all but the classification layer; of that, {_named(self.kept)} kept, "
            f"{_named(self.fresh)} new with the prior, {_named(self.dropped)} dropped"
        )


def fine_tuning_config(checkpoint: Checkpoint, preset: TrainConfig, flags: Mapping[str, Any]) -> TrainConfig:
    """The preset with the checkpoint's architecture; flags win over both."""
    config = with_flags(replace(preset, model=checkpoint.config.model), flags)
    return replace(config, pretrained_backbone=False)  # its weights come from the checkpoint


def lineage(checkpoint: Checkpoint) -> str:
    """Tell how the weights that a training starts from were made, the newest part first."""
    notes = checkpoint.training or {}
    made = notes.get("command") or notes.get("imported") or "unknown"
    parts = [f"{made} (commit {notes.get('commit') or 'unknown'}, {checkpoint.step} steps)"]
    return " <- ".join([*parts, *filter(None, [notes.get("started_from")])])


@torch.no_grad()
def transfer(network: RetinaNet, checkpoint: Checkpoint, labels: Sequence[Label]) -> Transfer:
    """Give a fresh network of `labels` the checkpoint's best weights. InvalidCheckpoint: they do not fit it."""
    expected, given = network.state_dict(), checkpoint.best_weights
    _refuse_misfits(given, expected)
    state = {name: given.get(name, fresh) for name, fresh in expected.items()}
    names, old_names = ([label.label for label in each] for each in (labels, checkpoint.labels))
    kept = [name for name in names if name in old_names]
    columns, old_columns = ([each.index(name) for name in kept] for each in (names, old_names))
    for entry in LOGITS:
        fresh = _by_class(expected[entry], len(names)).clone()
        fresh[:, columns] = _by_class(given[entry].to(fresh.device), len(old_names))[:, old_columns]
        state[entry] = fresh.flatten(0, 1)
    network.load_state_dict(state, strict=True)
    return Transfer(
        tensors_kept=sum(name in given for name in expected) - len(LOGITS),
        kept=tuple(kept),
        fresh=tuple(name for name in names if name not in old_names),
        dropped=tuple(name for name in old_names if name not in names),
    )


def freeze_stages(network: RetinaNet, count: int) -> None:
    """Fix the first `count` stages of the backbone, the stem being one: weights, and batch norm by its statistics.

    To be repeated whenever the network is put into training mode. ValueError: the backbone has fewer stages.
    """
    stages = backbone_stages(network.backbone.body)
    if not 0 <= count <= len(stages):
        raise ValueError(f"the backbone has {len(stages)} stages, stem included; {count} cannot be frozen")
    for stage in stages[:count]:
        for module in stage:
            module.eval().requires_grad_(False)


def backbone_stages(body: nn.Module) -> list[list[nn.Module]]:
    """The body's modules by stage, stem first: a `layer` of a ResNet; in MobileNetV3 a halving block begins one."""
    stages: list[list[nn.Module]] = [[]]
    for name, module in body.named_children():
        if name.startswith("layer") or getattr(module, "_is_cn", False):
            stages.append([])
        stages[-1].append(module)
    return stages


def _by_class(values: Tensor, num_classes: int) -> Tensor:
    """[anchors * classes, ...], anchor-major -> [anchors, classes, ...]"""
    return values.reshape(-1, num_classes, *values.shape[1:])


def _refuse_misfits(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    names = [name for name in {**expected, **given} if name not in LOGITS and not name.endswith(BATCH_COUNTER)]
    misfits = [
        f"{name} is {_shape(given, name)} there and {_shape(expected, name)} here"
        for name in names
        if _shape(given, name) != _shape(expected, name)
    ]
    if misfits:
        more = f", and {len(misfits) - 1} more" if len(misfits) > 1 else ""
        raise InvalidCheckpoint(
            f"the checkpoint's weights do not fit the network: {misfits[0]}{more}; give no flag that changes its shape"
        )


def _shape(state: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(state[name].shape)) if name in state else "absent"


def _named(classes: Sequence[str]) -> str:
    more = f", … {len(classes) - NAMED} more" if len(classes) > NAMED else ""
    return f"{len(classes)} ({', '.join(classes[:NAMED])}{more})" if classes else "none"
