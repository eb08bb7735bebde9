"""The training loop: batches in, checkpoints out.

A run folder holds `last.pt` (to go on from), `best.pt` (by AP), and `metrics.jsonl` (one line for every LOG_EVERY
steps and every evaluation). A step's samples, learning rate and batch-norm state depend only on its number, so a
resumed run is the run it resumes.
"""

import copy
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model.candidates import CandidateDetector, Normalise
from model.metadata import Label
from model.retinanet import RetinaNet
from training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from training.coco import CocoDataSet
from training.config import OptimiserConfig, TrainConfig
from training.data import load_batches
from training.evaluate import ApReport, Predictor, evaluate, torch_run
from training.losses import Losses, retinanet_losses
from training.transforms import Batch

log = logging.getLogger(__name__)
LOG_EVERY = 20


class TrainingDiverged(RuntimeError):
    """A loss is no longer a number; the text says at which step, and where the last good weights are."""


class RunFolderInUse(ValueError):
    """The folder holds a run; `--resume` goes on with it."""


@dataclass
class TrainState:
    """What changes from step to step."""

    network: RetinaNet
    averaged: RetinaNet | None
    """The moving average of the weights, or None."""
    optimiser: torch.optim.Optimizer
    step: int = 0
    best: tuple[int, float] = (0, -1.0)
    """Pictures and AP of the best evaluation: more pictures win over fewer, then the higher AP."""


def train(
    config: TrainConfig,
    training_set: CocoDataSet,
    validation_set: CocoDataSet,
    out: Path,
    *,
    device: torch.device,
    workers: int,
    resume: bool,
    notes: Mapping[str, str],
) -> ApReport:
    """Train to the last step and return its AP. RunFolderInUse, TrainingDiverged, InvalidDataSet, InvalidCheckpoint."""
    state = _start_or_resume(config, training_set.labels, out, device, resume=resume)
    run = _Run(config, training_set, validation_set, out, device, notes)
    batches = load_batches(training_set, config, first_step=state.step, workers=workers)
    report = None
    with tqdm(total=config.steps, initial=state.step, desc=out.name, unit="step", smoothing=0.05) as progress:
        for batch, data_seconds in _timed(batches):
            losses = run.step(state, batch)
            run.log_losses(state, losses, data_seconds, progress)
            if _due(state.step, config.evaluate_every) and state.step < config.steps:
                report = run.evaluate(state, limit=config.evaluate_images)
            if _due(state.step, config.checkpoint_every):
                run.save(state, "last.pt", report)
    report = run.evaluate(state, limit=0)
    run.save(state, "last.pt", report)
    return report


@dataclass
class _Run:
    config: TrainConfig
    training_set: CocoDataSet
    validation_set: CocoDataSet
    out: Path
    device: torch.device
    notes: Mapping[str, str]
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.normalise = Normalise().to(self.device)

    def step(self, state: TrainState, batch: Batch) -> Losses:
        """One update of the weights."""
        started = time.perf_counter()
        set_learning_rate(state.optimiser, self.config, state.step)
        set_train_mode(state.network, self.config, state.step)
        losses = self._losses(state, batch)
        if not math.isfinite(losses.total.item()):
            raise TrainingDiverged(
                f"step {state.step + 1}: classification loss {losses.classification.item():.4g}, box loss "
                f"{losses.box.item():.4g}. The last good weights are in {self.out / 'last.pt'}; "
                f"a lower --learning-rate, more --warmup-steps or --gradient-clip may help."
            )
        state.optimiser.zero_grad(set_to_none=True)
        losses.total.backward()  # type: ignore[no-untyped-call]
        if self.config.optimiser.gradient_clip:
            nn.utils.clip_grad_norm_(state.network.parameters(), self.config.optimiser.gradient_clip)
        state.optimiser.step()
        state.step += 1
        if state.averaged is not None:
            update_average(state.averaged, state.network, self.config.optimiser.ema_decay, state.step)
        self.seconds += time.perf_counter() - started
        return losses

    def _losses(self, state: TrainState, batch: Batch) -> Losses:
        network = state.network
        images = self.normalise(batch.images.to(self.device), batch.sizes.to(self.device))
        outputs = network(images.contiguous(memory_format=torch.channels_last))
        canvas = (batch.images.shape[1], batch.images.shape[2])
        anchors = torch.cat(network.anchors(canvas, outputs.grids))
        targets = [target.to(self.device) for target in batch.targets]
        return retinanet_losses(network.flatten(outputs), anchors, targets, self.config.loss)

    def evaluate(self, state: TrainState, *, limit: int) -> ApReport:
        """AP of the weights that export would take; keeps the best in best.pt."""
        network = state.averaged or state.network
        detector = CandidateDetector(network, self.training_set.labels).to(self.device).eval()
        predictor = Predictor(torch_run(detector), self.training_set.labels, self.config.resize)
        report = evaluate(predictor, self.validation_set, limit=limit)
        self._append({"step": state.step, "ap": report.ap, "ap50": report.ap50, "pictures": report.num_images})
        if (report.num_images, report.ap) >= state.best:
            state.best = report.num_images, report.ap
            self.save(state, "best.pt", report)
        return report

    def save(self, state: TrainState, name: str, report: ApReport | None) -> None:
        checkpoint = Checkpoint(
            config=self.config,
            labels=self.training_set.labels,
            model=state.network.state_dict(),
            ema=None if state.averaged is None else state.averaged.state_dict(),
            step=state.step,
            ap=None if report is None or math.isnan(report.ap) else report.ap,
            data_set=str(self.training_set.annotation_file.parent.parent.name),
            training=self.notes,
            optimiser={"state": state.optimiser.state_dict(), "best": list(state.best)},
        )
        save_checkpoint(checkpoint, self.out / name)

    def log_losses(self, state: TrainState, losses: Losses, data_seconds: float, progress: Any) -> None:
        progress.update()
        if not _due(state.step, LOG_EVERY):
            return
        classification, box = losses.classification.item(), losses.box.item()
        rate = state.optimiser.param_groups[0]["lr"]
        progress.set_postfix(cls=f"{classification:.3f}", box=f"{box:.3f}", lr=f"{rate:.1e}")
        entry = {
            "step": state.step,
            "classification_loss": classification,
            "box_loss": box,
            "learning_rate": rate,
            "data_seconds": round(data_seconds, 4),
            "step_seconds": round(self.seconds / LOG_EVERY, 4),
        }
        self.seconds = 0.0
        self._append(entry)

    def _append(self, entry: Mapping[str, Any]) -> None:
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of the update that follows `step` updates: linear warm-up, then milestones or a cosine."""
    optimiser = config.optimiser
    peak = optimiser.learning_rate * config.batch_size / optimiser.reference_batch_size
    if step < optimiser.warmup_steps:
        return peak * (step + 1) / optimiser.warmup_steps
    if optimiser.schedule == "steps":
        return float(peak * 0.1 ** sum(step >= milestone * config.steps for milestone in optimiser.milestones))
    done = (step - optimiser.warmup_steps) / max(1, config.steps - optimiser.warmup_steps)
    return peak * (1 + math.cos(math.pi * done)) / 2


def set_learning_rate(optimiser: torch.optim.Optimizer, config: TrainConfig, step: int) -> None:
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(config, step)


def set_train_mode(network: nn.Module, config: TrainConfig, step: int) -> None:
    """Training mode, but batch norm by its running statistics once `freeze_batch_norm_from` of the steps are done."""
    network.train()
    if step >= config.optimiser.freeze_batch_norm_from * config.steps:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def build_optimiser(network: nn.Module, config: OptimiserConfig) -> torch.optim.Optimizer:
    """Weight decay applies to convolutions' weights only: not to biases and norms."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimiser == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)


@torch.no_grad()
def update_average(averaged: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the weights; faster in the first steps, so that it soon forgets the random start."""
    decay = min(decay, (1 + step) / (10 + step))
    for average, value in zip(_tensors(averaged), _tensors(network), strict=True):
        if average.is_floating_point():
            average.lerp_(value, 1 - decay)
        else:
            average.copy_(value)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _start_or_resume(
    config: TrainConfig, labels: tuple[Label, ...], out: Path, device: torch.device, *, resume: bool
) -> TrainState:
    last = out / "last.pt"
    if last.exists() and not resume:
        raise RunFolderInUse(f"{out} holds a run; --resume goes on with it, another --out starts a new one")
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    resuming = last.exists()
    network = RetinaNet(config.model, len(labels), pretrained_backbone=config.pretrained_backbone and not resuming).to(
        device, memory_format=torch.channels_last
    )  # type: ignore[call-overload]
    averaged = copy.deepcopy(network).eval() if config.optimiser.ema_decay else None
    state = TrainState(network, averaged, build_optimiser(network, config.optimiser))
    if resuming:
        _restore(state, load_checkpoint(last), config, labels)
    return state


def _restore(state: TrainState, checkpoint: Checkpoint, config: TrainConfig, labels: tuple[Label, ...]) -> None:
    if checkpoint.config != config or checkpoint.labels != labels:
        raise RunFolderInUse("the run was started with other settings or labels; resume it with the same ones")
    assert checkpoint.optimiser is not None
    state.network.load_state_dict(dict(checkpoint.model))
    if state.averaged is not None and checkpoint.ema is not None:
        state.averaged.load_state_dict(dict(checkpoint.ema))
    state.optimiser.load_state_dict(checkpoint.optimiser["state"])
    state.step = checkpoint.step
    num_images, ap = checkpoint.optimiser["best"]
    state.best = num_images, ap
    log.info("resumed at step %d", state.step)


def _timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch with the seconds that were spent waiting for it."""
    started = time.perf_counter()
    for batch in batches:
        yield batch, time.perf_counter() - started
        started = time.perf_counter()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
