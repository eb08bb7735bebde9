"""A run's state, which changes with each step, and its conversion to and from a checkpoint."""

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from model.metadata import Label
from model.retinanet import RetinaNet
from training.checkpoint import Checkpoint, load_checkpoint
from training.coco import CocoDataSet
from training.config import Normaliser, TrainConfig
from training.distributed import Ranks
from training.evaluation.average_precision import ApReport
from training.exchange.finetune import freeze_stages, transfer
from training.loss.losses import loss_divisors
from training.optimiser import build_optimiser, memory_format, update_average

log = logging.getLogger(__name__)


class RunFolderInUse(ValueError):
    """The folder holds a run; `--resume` continues it."""


@dataclass
class TrainState:
    network: RetinaNet
    averaged: RetinaNet | None
    """Moving average of the weights, or None."""
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Scaler that keeps fp16's gradients above its smallest number; disabled for other precisions."""
    step: int = 0
    evaluated: int = 0
    """Step of the last evaluation."""
    report: ApReport | None = None
    """Report of the last evaluation of this process."""
    best: tuple[int, float] = (0, -1.0)
    """Pictures and AP of the best evaluation: more pictures are better, then a higher AP."""
    data_sets: dict[str, str] = field(default_factory=dict)
    """`CocoDataSet.summary` of both splits at the beginning of the run."""
    mean_positives: float = 100.0
    """Mean positive anchors of a step, over earlier steps, for `normaliser="running"`."""

    @property
    def best_network(self) -> RetinaNet:
        """The network that evaluation and export use."""
        return self.averaged or self.network

    def is_best(self, report: ApReport) -> bool:
        """Tell whether the last evaluation is the best so far. Without validation objects, the last weights are the
        best."""
        return math.isnan(report.ap) or (report.num_images, report.ap) >= self.best

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        return float(self.optimiser.param_groups[0]["lr"])

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = rate

    def loss_divisors(self, matches: Tensor, normaliser: Normaliser, ranks: Ranks) -> Tensor:
        """Compute the divisors of a step's losses, see `losses.loss_divisors`; with "running", update the mean."""
        divisors = loss_divisors(matches, normaliser, ranks=ranks, mean_positives=self.mean_positives)
        if normaliser == "running":
            self.mean_positives = divisors[0].item()
        return divisors

    def update(self, *, gradient_clip: float, ema_decay: float) -> None:
        """Update the weights by their gradients, and the moving average."""
        if gradient_clip:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self.network.parameters(), gradient_clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.step += 1
        if self.averaged is not None:
            update_average(self.averaged, self.network, ema_decay, self.step)

    def is_finite(self) -> bool:
        """Tell whether all weights and statistics are finite."""
        return all(bool(value.isfinite().all()) for value in self.network.state_dict().values())


def start_or_resume(
    config: TrainConfig,
    labels: tuple[Label, ...],
    out: Path,
    device: torch.device,
    ranks: Ranks,
    *,
    resume: bool,
    init: Checkpoint | None = None,
) -> TrainState:
    """Make the state of last.pt, or of step 0 with the weights of `init` if it is given.

    RunFolderInUse: there is a last.pt, which is not to be resumed or does not fit. InvalidCheckpoint: `init` does not
    fit.
    """
    last = out / "last.pt"
    resuming = ranks.from_first(last.exists())
    if resuming and not resume:
        raise RunFolderInUse(f"{out} holds a run; --resume continues it, another --out starts a new one")
    out.mkdir(parents=True, exist_ok=True)
    state = new_state(config, len(labels), device, ranks, pretrained=config.pretrained_backbone and not resuming)
    if resuming:
        _restore(state, load_checkpoint(last), config, labels)
    elif init is not None:
        log.info("%s", transfer(state.network, init, labels))
        if state.averaged is not None:
            state.averaged.load_state_dict(state.network.state_dict())
    return state


def new_state(
    config: TrainConfig, num_classes: int, device: torch.device, ranks: Ranks, *, pretrained: bool
) -> TrainState:
    torch.manual_seed(config.seed)
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    network = RetinaNet(config.model, num_classes, pretrained_backbone=pretrained)
    if ranks.size > 1 and device.type == "cuda":  # torch has none for the CPU: there each rank has its own statistics
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    network = network.to(device, dtype, memory_format=memory_format(config.channels_last, device))  # type: ignore[call-overload]
    freeze_stages(network, config.freeze_stages)
    averaged = copy.deepcopy(network).eval() if config.optimiser.ema_decay else None
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    return TrainState(network, averaged, build_optimiser(network, config.optimiser), scaler)


def to_checkpoint(
    state: TrainState, config: TrainConfig, labels: tuple[Label, ...], data_set: str, notes: Mapping[str, str]
) -> Checkpoint:
    report = state.report if state.evaluated == state.step else None
    return Checkpoint(
        config=config,
        labels=labels,
        model=state.network.state_dict(),
        ema=None if state.averaged is None else state.averaged.state_dict(),
        step=state.step,
        ap=None if report is None else report.known_ap,
        suggested_score_threshold=None if report is None else report.best_threshold,
        data_set=data_set,
        training=notes,
        resume={
            "state": state.optimiser.state_dict(),
            "scaler": state.scaler.state_dict(),
            "best": list(state.best),
            "evaluated": state.evaluated,
            "mean_positives": state.mean_positives,
            "data_sets": state.data_sets,
        },
    )


def note_data_sets(state: TrainState, *data_sets: CocoDataSet) -> None:
    """Note the run's data sets, and log how they differ from those at the beginning of a resumed run."""
    for data_set in data_sets:
        before, now = state.data_sets.get(data_set.split), data_set.summary
        if before not in (None, now):
            log.warning("%s has changed since the run began: %s -> %s", data_set.annotation_file, before, now)
        state.data_sets[data_set.split] = now


def checkpoint_bytes(state: TrainState) -> int:
    """Estimate the size of a checkpoint: weights, their average, and the optimiser's one or two values for each."""
    weights: int = sum(value.numel() * value.element_size() for value in state.network.state_dict().values())
    values = 2 if isinstance(state.optimiser, torch.optim.AdamW) else 1
    return weights * (1 + (state.averaged is not None) + values)


def _restore(state: TrainState, checkpoint: Checkpoint, config: TrainConfig, labels: tuple[Label, ...]) -> None:
    if checkpoint.config != config or checkpoint.labels != labels:
        raise RunFolderInUse("the run was started with other settings or labels; resume it with the same ones")
    assert checkpoint.resume is not None
    saved = checkpoint.resume
    state.network.load_state_dict(dict(checkpoint.model))
    if state.averaged is not None and checkpoint.ema is not None:
        state.averaged.load_state_dict(dict(checkpoint.ema))
    state.optimiser.load_state_dict(saved["state"])
    state.scaler.load_state_dict(saved.get("scaler", {}))
    state.step = checkpoint.step
    num_images, ap = saved["best"]
    state.best = num_images, ap
    # checkpoints of before 2026-11-25 were written after the evaluation of their step and have one kind of normaliser
    state.evaluated = saved.get("evaluated", checkpoint.step)
    state.mean_positives = saved.get("mean_positives", state.mean_positives)
    state.data_sets = dict(saved.get("data_sets", {}))
    log.info("resumed at step %d", state.step)
