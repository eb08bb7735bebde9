"""The training loop: batches in, checkpoints out.

A run folder holds `last.pt` (to go on from), `best.pt` (by AP), `metrics.jsonl` (one line for every `log_every` steps
and every evaluation), `report/` (a page to look at) and `tensorboard/`. A step's samples, learning rate and batch-norm
state depend only on its number, so a resumed run is the run it resumes. Run by torchrun, every process computes a share
of each step, and the gradients are those of the whole step.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from model.candidates import CandidateDetector, Normalise
from model.retinanet import Predictions
from training.checkpoint import Checkpoint, save_checkpoint
from training.coco import CocoDataSet, InvalidDataSet
from training.config import TrainConfig
from training.data import load_batches, sampling_seed
from training.distributed import ALONE, Ranks, gradients_kept, in_parallel
from training.evaluate import ApReport, evaluate, refuse_unknown_labels, torch_predictor
from training.losses import Losses, retinanet_losses
from training.optimiser import memory_format, peak_learning_rate, set_learning_rate, set_train_mode, update_average
from training.report.metrics import Record
from training.report.validation import EvaluationWatch, Seen
from training.state import TrainState, start_or_resume, to_checkpoint
from training.stopping import LossWatch, StopRequest, Terminated, TrainingDiverged
from training.transforms import Batch

log = logging.getLogger(__name__)
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
RUNNING_MEAN_KEEPS = 0.9
"""Of the mean number of positives at each step, with `normaliser="running"` (detectron2's)."""


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
    RankLost, Terminated: it ended before; last.pt is the last good state, and --resume goes on from it.
    """
    check_data(training_set, validation_set)
    state = start_or_resume(config, training_set.labels, out, device, ranks, resume=resume, init=init)
    record = Record(out, config, training_set, state.step) if ranks.is_first else None
    run = Run(
        config, training_set, validation_set, out, device, notes, ranks, in_parallel(state.network, ranks), record
    )
    run.log_scale()
    batches = load_batches(
        training_set,
        config,
        first_step=state.step,
        workers=workers,
        ranks=ranks,
        pin_memory=device.type == "cuda",
    )
    with (
        StopRequest().heeded() as stop,
        closing(record) if record else nullcontext(),
        tqdm(
            total=config.steps,
            initial=state.step,
            desc=out.name,
            unit="step",
            smoothing=0.05,
            disable=not ranks.is_first,
        ) as progress,
    ):
        run.evaluate_if_due(state, stop)
        for batch, data_seconds in _timed(batches):
            losses = run.step(state, batch)
            run.log_losses(state, losses, data_seconds, progress)
            if ranks.any(stop.came):
                run.save(state, "last.pt")
                ranks.any(False)  # the first to leave ends the others, and rank 0 is writing
                raise Terminated(f"SIGTERM: stopped after step {state.step}; --resume goes on from {out / 'last.pt'}")
            run.evaluate_if_due(state, stop)
            if _due(state.step, config.checkpoint_every):
                run.save(state, "last.pt")
        report = run.evaluate(state, stop, limit=0)
    run.save(state, "last.pt")
    return report


def check_data(training_set: CocoDataSet, validation_set: CocoDataSet) -> None:
    """InvalidDataSet: there is nothing to learn, or validation has labels that training lacks."""
    columns = np.concatenate([picture.target.columns for picture in training_set.pictures])
    if not len(columns):
        raise InvalidDataSet(f"{training_set.annotation_file} has no objects, so there is nothing to learn from it")
    refuse_unknown_labels(training_set.labels, validation_set)
    absent = [label.label for column, label in enumerate(training_set.labels) if column not in columns]
    if absent:
        log.warning("%s has no objects of %s", training_set.annotation_file, ", ".join(absent))


@dataclass
class Run:
    """One run: what it is made of, and what it does with a state."""

    config: TrainConfig
    training_set: CocoDataSet
    validation_set: CocoDataSet
    out: Path
    device: torch.device
    notes: Mapping[str, str]
    ranks: Ranks
    forward: nn.Module
    """The network, with gradients that are shared among the ranks."""
    record: Record | None = None
    """What is shown of the run; rank 0 has it."""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.normalise = Normalise().to(self.device)
        self.watch = LossWatch(self.config.divergence_factor)
        self.unreadable: set[str] = set()

    def step(self, state: TrainState, batch: Batch) -> Losses:
        """One update of the weights. The losses are those of the whole step, over all parts and ranks."""
        started = time.perf_counter()
        self._name_unreadable(batch)
        set_learning_rate(state.optimiser, self.config, state.step)
        set_train_mode(state.network, self.config, state.step)
        state.optimiser.zero_grad(set_to_none=True)
        losses = self._backward(state, batch)
        try:
            self.watch.check(state.step + 1, losses)
        except TrainingDiverged as error:
            raise self._diverged(str(error)) from None
        if self.config.optimiser.gradient_clip:
            state.scaler.unscale_(state.optimiser)
            nn.utils.clip_grad_norm_(state.network.parameters(), self.config.optimiser.gradient_clip)
        state.scaler.step(state.optimiser)
        state.scaler.update()
        state.step += 1
        if state.averaged is not None:
            update_average(state.averaged, state.network, self.config.optimiser.ema_decay, state.step)
        self.seconds += time.perf_counter() - started
        return losses

    def _backward(self, state: TrainState, batch: Batch) -> Losses:
        """Gradients of the step's total loss. Its divisor is known only when its last part is computed: until then the
        gradients are those of the parts so far."""
        canvas = self.ranks.max(torch.tensor(batch.canvas, device=self.device)).tolist()
        parts = batch.padded_to((canvas[0], canvas[1])).split(self.config.accumulate_steps)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        divisor = torch.ones_like(sums[2])
        for part in parts:
            with gradients_kept(self.forward, apart=part is not parts[-1]):
                losses = self._losses(state, part)
                own = torch.stack([losses.classification_sum, losses.box_sum, losses.divisor.to(losses.box_sum.dtype)])
                sums += self.ranks.sum(own.detach().double())
                before, divisor = divisor, self._divisor(state, sums[2])
                if part is not parts[0]:
                    _scale_gradients(state.network, before / divisor)
                share = (losses.classification_sum + losses.box_sum) * (self.ranks.size / divisor)
                state.scaler.scale(share).backward()  # type: ignore[no-untyped-call]
        if self.config.loss.normaliser == "running":
            state.mean_positives = divisor.item()
        return Losses(sums[0], sums[1], divisor)

    def _losses(self, state: TrainState, batch: Batch) -> Losses:
        network = state.network
        pixels = batch.images.to(self.device, non_blocking=True)
        images = self.normalise(pixels, batch.sizes.to(self.device)).to(network.dtype)
        precision = AUTOCAST.get(self.config.precision)
        with torch.autocast(self.device.type, precision, enabled=precision is not None):
            outputs = self.forward(images.contiguous(memory_format=memory_format(self.config, self.device)))
        predictions = network.flatten(outputs)
        predictions = Predictions(
            predictions.cls_logits.to(network.dtype), predictions.bbox_regression.to(network.dtype)
        )
        anchors = torch.cat(network.anchors(batch.canvas, outputs.grids))
        targets = [target.to(self.device, network.dtype) for target in batch.targets]
        return retinanet_losses(
            predictions,
            anchors,
            targets,
            self.config.loss,
            sizes=[(height, width) for height, width in batch.sizes.tolist()],
            seed=sampling_seed(self.config.seed, state.step),
        )

    def _divisor(self, state: TrainState, counted: Tensor) -> Tensor:
        if self.config.loss.normaliser == "running":
            return RUNNING_MEAN_KEEPS * state.mean_positives + (1 - RUNNING_MEAN_KEEPS) * counted.clamp(min=1)
        return counted.clamp(min=1)

    def evaluate_if_due(self, state: TrainState, stop: StopRequest) -> None:
        if _due(state.step, self.config.evaluate_every) and state.evaluated < state.step < self.config.steps:
            self.evaluate(state, stop, limit=self.config.evaluate_images)

    def evaluate(self, state: TrainState, stop: StopRequest, *, limit: int) -> ApReport:
        """AP of the weights that export would take; keeps the best in best.pt. It takes long: last.pt comes first."""
        self.save(state, "last.pt")
        labels, network = self.training_set.labels, state.best_network
        watch = EvaluationWatch(network, labels, self.validation_set, self.config, limit=limit)
        with stop.at_once(), watch.watching():
            detector = CandidateDetector(network, labels).to(self.device).eval()
            report = evaluate(
                torch_predictor(detector, labels, self.config),
                self.validation_set,
                limit=limit,
                skip_unreadable=self.config.unreadable == "skip",
                ranks=self.ranks,
                look=watch,
            )
            seen = Seen(report, watch.losses, watch.pictures).gathered(self.ranks)
        state.evaluated, state.report = state.step, report
        if state.is_best(report):
            state.best = report.num_images, report.ap
            self.save(state, "best.pt")
        if self.record:
            self.record.add_evaluation(state.step, seen)
        return report

    def save(self, state: TrainState, name: str) -> None:
        """Rank 0 writes. TrainingDiverged, and nothing is written, if the weights are no longer numbers."""
        if not state.is_finite():
            raise self._diverged(f"the update of step {state.step} made weights that are no numbers")
        if self.ranks.is_first:
            data_set = self.training_set.annotation_file.parent.parent.name
            save_checkpoint(
                to_checkpoint(state, self.config, self.training_set.labels, data_set, self.notes), self.out / name
            )

    def log_scale(self) -> None:
        optimiser = self.config.optimiser
        log.info(
            "learning rate %g = %g for %d images a step x %d / %d; %d process(es), %s, %d part(s) a step",
            peak_learning_rate(self.config),
            optimiser.learning_rate,
            optimiser.reference_batch_size,
            self.config.batch_size,
            optimiser.reference_batch_size,
            self.ranks.size,
            self.config.precision,
            self.config.accumulate_steps,
        )

    def log_losses(self, state: TrainState, losses: Losses, data_seconds: float, progress: Any) -> None:
        progress.update()
        if not _due(state.step, self.config.log_every):
            return
        classification, box = losses.classification.item(), losses.box.item()
        rate = state.optimiser.param_groups[0]["lr"]
        waiting = data_seconds / (data_seconds + self.seconds / self.config.log_every)
        progress.set_postfix(cls=f"{classification:.3f}", box=f"{box:.3f}", lr=f"{rate:.1e}", data=f"{waiting:.0%}")
        entry = {
            "step": state.step,
            "classification_loss": classification,
            "box_loss": box,
            "learning_rate": rate,
            "data_seconds": round(data_seconds, 4),
            "step_seconds": round(self.seconds / self.config.log_every, 4),
        }
        self.seconds = 0.0
        if self.record:
            self.record.add(entry)

    def _name_unreadable(self, batch: Batch) -> None:
        for problem in batch.unreadable:
            if problem not in self.unreadable:
                self.unreadable.add(problem)
                log.warning("skipped, another picture stands in (%d so far): %s", len(self.unreadable), problem)

    def _diverged(self, cause: str) -> TrainingDiverged:
        return TrainingDiverged(
            f"{cause}. The last good weights are in {self.out / 'last.pt'}, if a checkpoint was due; "
            f"a lower --learning-rate, more --warmup-steps or --gradient-clip may help."
        )


@torch.no_grad()
def _scale_gradients(network: nn.Module, factor: Tensor) -> None:
    for parameter in network.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def _timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch with the seconds that were spent waiting for it."""
    started = time.perf_counter()
    for batch in batches:
        yield batch, time.perf_counter() - started
        started = time.perf_counter()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
