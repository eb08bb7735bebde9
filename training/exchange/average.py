"""The mean of the weights of several fine-tunings that began from one model.

Each weight is the mean of those of the checkpoints' best weights, batch norm's statistics included. The mean of runs
that differ in their seed or augmentation is often better than each of them, and costs no more to serve.

Source: Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
increasing inference time".
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from model.detector import Device
from training.checkpoint import Checkpoint, InvalidCheckpoint, build_detector
from training.coco import CocoDataSet
from training.evaluate import choose_device, evaluate, torch_predictor
from training.exchange.finetune import lineage


def average(checkpoints: Sequence[Checkpoint], notes: Mapping[str, str]) -> Checkpoint:
    """Return the first one's checkpoint with the mean weights, AP unknown, and nothing to resume from.

    InvalidCheckpoint: they differ in their network, size or classes, or there are fewer than two.
    """
    first, *others = checkpoints
    if not others:
        raise InvalidCheckpoint("a mean needs two checkpoints or more")
    for other in others:
        for name, ours, theirs in (
            ("network", first.config.model, other.config.model),
            ("classes", first.labels, other.labels),
            ("size", first.config.resize, other.config.resize),
        ):
            if ours != theirs:
                raise InvalidCheckpoint(f"the checkpoints cannot be averaged: their {name} differ: {ours} and {theirs}")
    weights = [checkpoint.best_weights for checkpoint in checkpoints]
    means = {name: mean([each[name] for each in weights]) for name in weights[0]}
    origin = " + ".join(map(lineage, checkpoints))
    return replace(
        first,
        model=means,
        ema=None,
        step=sum(checkpoint.step for checkpoint in checkpoints),
        ap=None,
        suggested_score_threshold=None,
        training={**notes, "started_from": origin},
        resume=None,
    )


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """The mean in float64; of counters, the first."""
    if not tensors[0].is_floating_point():
        return tensors[0]
    return torch.stack([tensor.double() for tensor in tensors]).mean(0).to(tensors[0].dtype)


def with_ap(checkpoint: Checkpoint, data_set: CocoDataSet, device: Device) -> Checkpoint:
    """Evaluate the checkpoint, and return it with its AP and its threshold of the best F1."""
    detector = build_detector(checkpoint).to(choose_device(device))
    config = checkpoint.config
    report = evaluate(torch_predictor(detector, checkpoint.labels, config.resize, config.detection), data_set)
    return replace(
        checkpoint,
        ap=report.known_ap,
        suggested_score_threshold=report.best_threshold,
        data_set=data_set.name,
    )
