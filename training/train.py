"""The training loop: batches in, checkpoints out.

A run folder holds `last.pt` (to resume from), `best.pt` (by AP), `metrics.jsonl` (one line for every `log_every` steps
and every validation), `report/` (a page) and `tensorboard/`. A step's samples, learning rate and batch-norm mode depend
only on its number, so a resumed run equals an uninterrupted one. Under torchrun every process computes a share of each
step, and the gradients are those of the whole step.
"""

import logging
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from model.candidates import Normalise
from model.retinanet import Predictions, RetinaNet
from training.annotations.pictures import refuse_absent, refuse_unreadable
from training.checkpoint import Checkpoint, describe, refuse_full_disk, save_checkpoint
from training.coco import CocoDataSet, InvalidDataSet
from training.config import Precision, TrainConfig
from training.data import load_batches, sampling_seed
from training.distributed import ALONE, Ranks, gradients_kept, in_parallel
from training.evaluate import refuse_unknown_labels
from training.evaluation.average_precision import ApReport
from training.loss.losses import Losses, match_batch, matched_losses
from training.optimiser import learning_rate, memory_format, peak_learning_rate, set_train_mode
from training.report.metrics import RunMetrics
from training.report.validation import validate
from training.state import TrainState, checkpoint_bytes, note_data_sets, start_or_resume, to_checkpoint
from training.stopping import DivergenceCheck, StopRequest, Terminated, TrainingDiverged
from training.transforms import Batch

log = logging.getLogger(__name__)
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
    ranks: Ranks = ALONE,
    init: Checkpoint | None = None,
) -> ApReport:
    """Train to the last step and return its AP. `init` holds the weights of step 0; None: random ones.

    RunFolderInUse, InvalidDataSet, InvalidCheckpoint: it cannot start. TrainingDiverged, CheckpointNotWritten,
    RankLost, Terminated: it ended early; last.pt is the last good state, and --resume continues from it.
    """
    check_data(training_set, validation_set)
    check_pictures(training_set, validation_set, config, ranks)
    state = start_or_resume(config, training_set.labels, out, device, ranks, resume=resume, init=init)
    note_data_sets(state, training_set, validation_set)
    if ranks.is_first:
        refuse_full_disk(checkpoint_bytes(state), out)
    metrics = RunMetrics(out, config, training_set, state.step) if ranks.is_first else None
    run = TrainingRun(config, training_set, validation_set, out, notes, ranks, metrics)
    divergence = DivergenceCheck(config.divergence_factor, out / "last.pt")
    predict = in_parallel(TrainingForward(state.network, config.precision, config.channels_last), ranks)
    batches = load_batches(
        training_set, config, first_step=state.step, workers=workers, ranks=ranks, pin_memory=device.type == "cuda"
    )
    _log_scale(config, ranks, device)
    describe(run.checkpoint(state), name="run", precision="fp32")  # what no file may carry
    with StopRequest().heeded() as stop, closing(metrics) if metrics else nullcontext():
        run.validate_if_due(state, stop)
        for batch, data_seconds in run.waited_for(batches, state, stop):
            started = time.perf_counter()
            begin_step(state, config)
            batch = batch.padded_to(ranks.largest(batch.canvas)).to(device, state.network.dtype)
            anchors = state.network.anchors_of(batch.canvas)
            matches = match_step(batch, anchors, config, state.step)
            divisors = state.loss_divisors(matches, config.loss.normaliser, ranks)
            losses = add_gradients(state, predict, batch, anchors, matches, divisors, config, ranks)
            divergence.check(state.step + 1, losses)
            state.update(gradient_clip=config.optimiser.gradient_clip, ema_decay=config.optimiser.ema_decay)
            if metrics:
                metrics.add_step(state.step, losses, state.learning_rate, data_seconds, time.perf_counter() - started)
            run.end_if_asked(state, stop)
            run.validate_if_due(state, stop)
            run.save_if_due(state)
        report = run.validate(state, stop, limit=0)
    run.save(state, "last.pt")
    return report


def check_data(training_set: CocoDataSet, validation_set: CocoDataSet) -> None:
    """Raise InvalidDataSet if there is nothing to learn, or validation has labels that training lacks."""
    columns = np.concatenate([picture.target.columns for picture in training_set.pictures])
    if not len(columns):
        raise InvalidDataSet(f"{training_set.annotation_file} has no objects, so there is nothing to learn from it")
    refuse_unknown_labels(training_set.labels, validation_set)
    absent = [label.label for column, label in enumerate(training_set.labels) if column not in columns]
    if absent:
        log.warning("%s has no objects of %s", training_set.annotation_file, ", ".join(absent))


def check_pictures(training_set: CocoDataSet, validation_set: CocoDataSet, config: TrainConfig, ranks: Ranks) -> None:
    """Raise InvalidDataSet if pictures are missing, or a validation picture cannot be decoded, which would fail AP."""
    skip = config.unreadable == "skip"
    refuse_absent(training_set, skip=skip)
    refuse_absent(validation_set, skip=skip)
    refuse_unreadable(validation_set, skip=skip, ranks=ranks)


def begin_step(state: TrainState, config: TrainConfig) -> None:
    """Set the learning rate and the modes of the next step, and clear the gradients."""
    state.learning_rate = learning_rate(config.optimiser, state.step, steps=config.steps, batch_size=config.batch_size)
    frozen_batch_norm = state.step >= config.optimiser.freeze_batch_norm_from * config.steps
    set_train_mode(state.network, frozen_stages=config.freeze_stages, frozen_batch_norm=frozen_batch_norm)
    state.optimiser.zero_grad(set_to_none=True)


def match_step(batch: Batch, anchors: Tensor, config: TrainConfig, step: int) -> Tensor:
    """Match the anchors to the objects of a step's images, before the first forward pass: int64 [N, A]."""
    sizes = [(height, width) for height, width in batch.sizes.tolist()]
    return match_batch(anchors, batch.targets, config.loss, sizes=sizes, seed=sampling_seed(config.seed, step))


def add_gradients(
    state: TrainState,
    predict: nn.Module,
    batch: Batch,
    anchors: Tensor,
    matches: Tensor,
    divisors: Tensor,
    config: TrainConfig,
    ranks: Ranks,
) -> Losses:
    """Compute the step's gradients, part by part, and return its losses, those of all ranks together."""
    sums = torch.zeros(2, dtype=torch.float64, device=batch.images.device)
    parts = batch.parts(config.accumulate_steps)
    for part in parts:
        with gradients_kept(predict, apart=part is not parts[-1]):
            predictions = predict(batch.images[part], batch.sizes[part])
            own = matched_losses(predictions, anchors, batch.targets[part], matches[part], divisors[part], config.loss)
            share = own.total * ranks.size  # the ranks' gradients will be averaged
            state.scaler.scale(share).backward()  # type: ignore[no-untyped-call]
        sums += torch.stack([own.classification, own.box]).detach()
    return Losses(*ranks.sum(sums))


class TrainingForward(nn.Module):
    """The network in training: from a batch's images to predictions, in the chosen precision."""

    def __init__(self, network: RetinaNet, precision: Precision, channels_last: bool | None) -> None:
        super().__init__()
        self.normalise = Normalise().to(next(network.parameters()).device)
        self.network = network
        self.precision = AUTOCAST.get(precision)
        self.channels_last = channels_last

    def forward(self, images: Tensor, sizes: Tensor) -> Predictions:
        """Turn images uint8 [N, H, W, 3] RGB and sizes int64 [N, 2] (height, width) into predictions, weights'
        dtype."""
        device, dtype = images.device, self.network.dtype
        pixels = self.normalise(images, sizes.to(device)).to(dtype)
        pixels = pixels.contiguous(memory_format=memory_format(self.channels_last, device))
        with torch.autocast(device.type, self.precision, enabled=self.precision is not None):
            outputs = self.network(pixels)
        predictions = self.network.flatten(outputs)
        return Predictions(predictions.cls_logits.to(dtype), predictions.bbox_regression.to(dtype))


@dataclass(frozen=True)
class TrainingRun:
    """The work of a run between steps: checkpoints and validations."""

    config: TrainConfig
    training_set: CocoDataSet
    validation_set: CocoDataSet
    out: Path
    notes: Mapping[str, str]
    ranks: Ranks
    metrics: RunMetrics | None
    """Metrics; None on other ranks than 0."""

    def waited_for(
        self, batches: Generator[Batch, None, None], state: TrainState, stop: StopRequest
    ) -> Iterator[tuple[Batch, float]]:
        """Yield each batch with the seconds of waiting for it.

        Terminated: SIGTERM came meanwhile; last.pt is written. (Several processes end together, after a step.)
        """
        with closing(batches):
            while True:
                started = time.perf_counter()
                try:
                    with stop.at_once() if self.ranks.size == 1 else nullcontext():
                        batch = next(batches, None)
                except Terminated as stopped:
                    raise self._end(state) from stopped
                if batch is None:
                    return
                yield batch, time.perf_counter() - started

    def validate_if_due(self, state: TrainState, stop: StopRequest) -> None:
        if _due(state.step, self.config.evaluate_every) and state.evaluated < state.step < self.config.steps:
            self.validate(state, stop, limit=self.config.evaluate_images)

    def validate(self, state: TrainState, stop: StopRequest, *, limit: int) -> ApReport:
        """Evaluate the weights that export would take, and keep the best in best.pt. last.pt is written before."""
        self.save(state, "last.pt")
        with stop.at_once():
            validation = validate(
                state.best_network,
                self.training_set.labels,
                self.validation_set,
                self.config,
                limit=limit,
                ranks=self.ranks,
            )
        report = validation.ap
        state.evaluated, state.report = state.step, report
        if state.is_best(report):
            state.best = report.num_images, report.ap
            self.save(state, "best.pt")
        if self.metrics:
            self.metrics.add_validation(state.step, validation)
        return report

    def end_if_asked(self, state: TrainState, stop: StopRequest) -> None:
        """Raise Terminated if SIGTERM came to one of the ranks; last.pt is written."""
        if self.ranks.any(stop.came):
            ended = self._end(state)
            self.ranks.any(False)  # the first to leave ends the others, and rank 0 is writing
            raise ended

    def _end(self, state: TrainState) -> Terminated:
        self.save(state, "last.pt")
        return Terminated(f"SIGTERM: stopped after step {state.step}; --resume continues from {self.out / 'last.pt'}")

    def save_if_due(self, state: TrainState) -> None:
        if _due(state.step, self.config.checkpoint_every):
            self.save(state, "last.pt")

    def save(self, state: TrainState, name: str) -> None:
        """Write the checkpoint `name`, on rank 0. TrainingDiverged, and nothing is written: weights are not finite."""
        if not state.is_finite():
            raise TrainingDiverged(
                f"the update of step {state.step} made weights that are NaN or infinite", self.out / "last.pt"
            )
        if self.ranks.is_first:
            save_checkpoint(self.checkpoint(state), self.out / name)

    def checkpoint(self, state: TrainState) -> Checkpoint:
        return to_checkpoint(state, self.config, self.training_set.labels, self.training_set.name, self.notes)


def _log_scale(config: TrainConfig, ranks: Ranks, device: torch.device) -> None:
    peak, reference = peak_learning_rate(config.optimiser, config.batch_size), config.optimiser.reference_batch_size
    scale = peak, config.optimiser.learning_rate, reference, config.batch_size, reference
    log.info("learning rate %g = %g for %d images a step x %d / %d", *scale)
    log.info("%d process(es), %s, %d part(s) a step", ranks.size, config.precision, config.accumulate_steps)
    if device.type == "cuda" and config.precision == "fp32" and torch.backends.cudnn.allow_tf32:
        log.info("on this GPU fp32 convolutions are TF32, with 10 bits of mantissa: torch's default")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
