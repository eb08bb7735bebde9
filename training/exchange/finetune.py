"""Fine-tuning: a training that starts from a checkpoint's weights, with the classes of its own data set.

The architecture is the checkpoint's; the preset defines everything else. A flag may change values without weights, such
as the anchors' sizes; one that does not fit the weights is refused. All weights are kept, except some columns of the
classification layer: a class keeps its column if the checkpoint has a class of that name; another starts with the
prior, as in a new network. `python -m training import` makes such a checkpoint of torchvision's COCO weights.
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
"""Ending of the batch norms' counters, which frozen norms lack and which have no effect."""
NAMED = 5
"""Most classes that a message names before it counts the others."""


@dataclass(frozen=True)
class Transfer:
    """The classes of a checkpoint and of the data set, by what became of their columns."""

    tensors_kept: int
    kept: tuple[str, ...]
    """Classes whose column of the classification layer was kept."""
    fresh: tuple[str, ...]
    """Classes whose column starts with the prior."""
    dropped: tuple[str, ...]
    """Classes of the checkpoint that the data set lacks."""

    def __str__(self) -> str:
        return (
            f"kept {self.tensors_kept} tensors, all but the classification layer; of that, {_named(self.kept)} kept, "
            f"{_named(self.fresh)} new with the prior, {_named(self.dropped)} dropped"
        )


def fine_tuning_config(checkpoint: Checkpoint, preset: TrainConfig, flags: Mapping[str, Any]) -> TrainConfig:
    """Make the preset with the checkpoint's architecture; flags override both."""
    config = with_flags(replace(preset, model=checkpoint.config.model), flags)
    return replace(config, pretrained_backbone=False)  # its weights come from the checkpoint


def lineage(checkpoint: Checkpoint) -> str:
    """Describe how the initial weights of a training were made, the newest part first."""
    notes = checkpoint.training or {}
    made = notes.get("command") or notes.get("imported") or "unknown"
    parts = [f"{made} (commit {notes.get('commit') or 'unknown'}, {checkpoint.step} steps)"]
    return " <- ".join([*parts, *filter(None, [notes.get("started_from")])])


@torch.no_grad()
def transfer(network: RetinaNet, checkpoint: Checkpoint, labels: Sequence[Label]) -> Transfer:
    """Load the checkpoint's best weights into a new network of `labels`. InvalidCheckpoint: they do not fit."""
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
    """Freeze the first `count` stages of the backbone (1 is the stem): weights and batch norm statistics.

    Repeat it whenever the network is put into training mode. ValueError: the backbone has fewer stages.
    """
    stages = backbone_stages(network.backbone.body)
    if not 0 <= count <= len(stages):
        raise ValueError(f"the backbone has {len(stages)} stages, stem included; {count} cannot be frozen")
    for stage in stages[:count]:
        for module in stage:
            module.eval().requires_grad_(False)


def backbone_stages(body: nn.Module) -> list[list[nn.Module]]:
    """Return the body's modules by stage, stem first: a ResNet's `layer`; in MobileNetV3 a stride begins a stage."""
    stages: list[list[nn.Module]] = [[]]
    for name, module in body.named_children():
        if name.startswith("layer") or getattr(module, "_is_cn", False):
            stages.append([])
        stages[-1].append(module)
    return stages


def _by_class(values: Tensor, num_classes: int) -> Tensor:
    """Reshape [anchors * classes, ...], anchor-major, to [anchors, classes, ...]."""
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
