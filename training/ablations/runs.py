"""Ablations: small training runs that differ in one value, to check the claims of *The intuition behind RetinaNet*.

    python -m training ablations --data DIR --out RUNS

Every ablation in ABLATIONS is the `ablation` preset with some values changed. It is trained in its own run folder and
evaluated, and its result is appended to OUT/results.jsonl. A stopped run continues: finished ablations are skipped, and
the unfinished one resumes. At the end the page is written from the results that exist. `training.ablations.claims` says
which ablations a claim compares.
"""

import json
import logging
import os
import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from model.detector import Device
from model.files import write_whole
from training.coco import CocoDataSet, load_coco
from training.config import TrainConfig, override
from training.evaluate import Predictor, choose_device, evaluate, open_predictor
from training.evaluation.average_precision import ApReport
from training.presets import PRESETS, PROPOSAL_LOSS, PROPOSALS
from training.report.page import read_metrics
from training.stopping import TrainingDiverged
from training.train import train

log = logging.getLogger(__name__)
TIMED_PICTURES = 50
PYRAMID_SCALES = (192, 256, 320)
"""Shorter sides, px: 600, 800 and 1,000 scaled to the preset's 256."""


@dataclass(frozen=True)
class Ablation:
    name: str
    change: str
    """The change in words, for the page."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Values that differ from the preset's, by the names of their flags."""
    model_of: str = ""
    """The ablation whose model is evaluated; empty: this ablation trains its own."""
    scales: tuple[int, ...] = ()
    """Shorter sides of an image pyramid, in the evaluation."""

    def config(self, steps: int | None) -> TrainConfig:
        """Give the preset with the values changed, of at most `steps` steps."""
        config = override(PRESETS["ablation"], self.values)
        return config if steps is None else replace(config, steps=min(steps, config.steps))


CROSS_ENTROPY = {"focal_gamma": 0.0, "focal_alpha": -1.0}
PAPERS_SGD = {
    "optimiser": "sgd", "learning_rate": 0.01, "reference_batch_size": 16, "weight_decay": 1e-4, "warmup_steps": 0,
    "schedule": "steps", "milestones": (1.0,), "gradient_clip": 0.0, "ema_decay": 0.0, "head_norm": "none",
    "steps": 100,
}  # fmt: skip
"""The paper's SGD, without warm-up, clipping, norms in the heads and AdamW, which mitigate a bad start."""
RPN = {**vars(PROPOSAL_LOSS), **vars(PROPOSALS), "head": "shared", "head_convs": 1, "p6_from": "pool"}
RPN_ANCHORS = {"scales": (1.0,), "lowest_level": 2}

ABLATIONS = (
    Ablation("baseline", "RetinaNet: FPN, focal loss γ 2 α 0.25, prior 0.01, smooth-L1 σ 3"),
    Ablation("baseline-again", "the baseline with another seed", {"seed": 1}),
    # 1. the loss
    Ablation("cross-entropy", "cross-entropy: γ 0, no α", CROSS_ENTROPY),
    Ablation("balanced", "α-balanced cross-entropy: γ 0, α 0.75", {"focal_gamma": 0.0, "focal_alpha": 0.75}),
    Ablation("sampled", "cross-entropy on 128 + 128 sampled anchors", {**CROSS_ENTROPY, "sampled_anchors": 256}),
    Ablation("gamma-0.5", "γ 0.5, α 0.5", {"focal_gamma": 0.5, "focal_alpha": 0.5}),
    Ablation("gamma-1", "γ 1, α 0.25", {"focal_gamma": 1.0}),
    Ablation("gamma-5", "γ 5, α 0.25", {"focal_gamma": 5.0}),
    # 2. the prior
    Ablation("no-prior", "no prior (0.5)", {"prior": 0.5}),
    Ablation("cross-entropy-no-prior", "cross-entropy, no prior (0.5)", {**CROSS_ENTROPY, "prior": 0.5}),
    Ablation("sgd", "the paper's SGD, 100 steps", PAPERS_SGD),
    Ablation("sgd-no-prior", "the paper's SGD, 100 steps, no prior (0.5)", {**PAPERS_SGD, "prior": 0.5}),
    Ablation(
        "sgd-cross-entropy-no-prior",
        "the paper's SGD, 100 steps, cross-entropy, no prior (0.5)",
        {**PAPERS_SGD, **CROSS_ENTROPY, "prior": 0.5},
    ),
    # 3. pyramids
    Ablation("top", "P5 alone, with the anchors of all levels", {"pyramid": "top"}),
    Ablation("rough", "levels without the top-down path", {"pyramid": "rough"}),
    Ablation(
        "image-pyramid", f"the baseline's model on pictures of {PYRAMID_SCALES} px", {}, "baseline", PYRAMID_SCALES
    ),
    Ablation("top-image-pyramid", f"`top`'s model on pictures of {PYRAMID_SCALES} px", {}, "top", PYRAMID_SCALES),
    # 4. proposals
    Ablation("rpn", "region proposal network on P2 to P6", {**RPN, **RPN_ANCHORS}),
    Ablation("rpn-top", "region proposal network on P5 alone", {**RPN, "scales": (1.0,), "pyramid": "top"}),
    # 5. the box loss
    Ablation("l1", "L1", {"box_loss": "l1"}),
    Ablation("giou", "GIoU", {"box_loss": "giou"}),
)


FIGURES: Mapping[str, Callable[[ApReport], float]] = {
    "AP": lambda report: report.ap,
    "AP50": lambda report: report.ap50,
    "AP75": lambda report: report.ap75,
    "AP small": lambda report: report.ap_small,
    "AP medium": lambda report: report.ap_medium,
    "AP large": lambda report: report.ap_large,
    "AR@100": lambda report: report.recall_100,
    "AR@1000": lambda report: report.recall_1000,
    "AR@1000 small": lambda report: report.recall_1000_by_size[0],
    "AR@1000 medium": lambda report: report.recall_1000_by_size[1],
    "AR@1000 large": lambda report: report.recall_1000_by_size[2],
}


@dataclass(frozen=True)
class Result:
    """A line of results.jsonl."""

    name: str
    steps: int
    failure: str
    """The reason why training diverged; empty: it did not."""
    figures: Mapping[str, float]
    """Values by the names in FIGURES; none if training diverged."""
    num_pictures: int
    seconds_per_picture: float
    """Median over some pictures, without decoding; 0 if there is no model."""
    minutes: float
    machine: str
    commit: str


def run_ablations(
    data: Path,
    out: Path,
    *,
    names: Collection[str] = (),
    steps: int | None = None,
    device: Device,
    workers: int,
    commit: str,
) -> list[Result]:
    """Run the ablations of these names (none: all) that have no result yet, and return all results.

    ValueError: a name is unknown, a model was not trained, or results in `out` have other settings.
    """
    unknown = set(names) - {ablation.name for ablation in ABLATIONS}
    if unknown:
        raise ValueError(
            f"there is no ablation {', '.join(sorted(unknown))}; there are {', '.join(r.name for r in ABLATIONS)}"
        )
    training_set = load_coco(data, "train", class_agnostic=True)
    validation_set = load_coco(data, "val", class_agnostic=True)
    runner = _Runner(training_set, validation_set, out, steps, device, workers, commit)
    out.mkdir(parents=True, exist_ok=True)
    for ablation in ABLATIONS:
        if not names or ablation.name in names:
            runner.run(ablation)
    return read_results(out)


@dataclass(frozen=True)
class _Runner:
    training_set: CocoDataSet
    validation_set: CocoDataSet
    out: Path
    steps: int | None
    device: Device
    workers: int
    commit: str

    def run(self, ablation: Ablation) -> None:
        done = {result.name: result.steps for result in read_results(self.out)}
        config = ablation.config(self.steps)
        if ablation.name not in done:
            log.info("%s: %s", ablation.name, ablation.change)
            result = self._result(ablation, config)
            append_result(self.out, result)
            log.info("%s: %s, %.1f minutes", ablation.name, result.failure or _ap(result), result.minutes)
        elif (steps := done[ablation.name]) != config.steps:
            raise ValueError(
                f"{self.out} has {ablation.name} after {steps} steps, not {config.steps}: use another --out"
            )

    def _result(self, ablation: Ablation, config: TrainConfig) -> Result:
        started = time.perf_counter()
        report, seconds, failure = None, 0.0, ""
        try:
            if not ablation.model_of:
                report = self._train(ablation, config)
            predictor = self._predictor(ablation)
            report = report or evaluate(predictor, self.validation_set)
            seconds = median_seconds(predictor, self.validation_set)
        except TrainingDiverged as error:
            failure = str(error)
        return Result(
            name=ablation.name,
            steps=config.steps,
            failure=failure,
            figures={} if report is None else {name: figure(report) for name, figure in FIGURES.items()},
            num_pictures=0 if report is None else report.num_images,
            seconds_per_picture=seconds,
            minutes=(time.perf_counter() - started) / 60,
            machine=machine(choose_device(self.device)),
            commit=self.commit,
        )

    def _train(self, ablation: Ablation, config: TrainConfig) -> ApReport:
        return train(
            config,
            self.training_set,
            self.validation_set,
            self.out / ablation.name,
            device=choose_device(self.device),
            workers=self.workers,
            resume=True,
            notes={"command": f"python -m training ablations --only {ablation.name}", "commit": self.commit},
        )

    def _predictor(self, ablation: Ablation) -> Predictor:
        file = self.out / (ablation.model_of or ablation.name) / "best.pt"
        if not file.exists():
            raise ValueError(f"ablation {ablation.name} needs the model of {ablation.model_of}: run that first")
        return replace(open_predictor(file, self.device), scales=ablation.scales)


def median_seconds(predictor: Predictor, data_set: CocoDataSet) -> float:
    """Measure the median seconds from pixels to detections of one picture."""
    seconds = []
    for index in range(min(TIMED_PICTURES, len(data_set))):
        pixels = data_set.read(index)
        started = time.perf_counter()
        predictor(pixels)
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[len(seconds) // 2]


def machine(device: torch.device) -> str:
    """Describe the device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{models[0] if models else platform.processor() or platform.machine()}, {cores} cores"


def append_result(out: Path, result: Result) -> None:
    file = out / "results.jsonl"
    before = file.read_text() if file.exists() else ""
    write_whole(file, (before + json.dumps(asdict(result)) + "\n").encode())


def read_results(out: Path) -> list[Result]:
    """Read the results, in the order of ABLATIONS."""
    file = out / "results.jsonl"
    results: dict[str, Result] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        result = Result(**json.loads(line))
        results[result.name] = result
    return [results[ablation.name] for ablation in ABLATIONS if ablation.name in results]


def read_losses(out: Path, name: str) -> Sequence[tuple[int, float]]:
    """Read the logged (step, classification loss + box loss) of an ablation's run."""
    entries = read_metrics(out / name / "metrics.jsonl")
    return [(e["step"], e["classification_loss"] + e["box_loss"]) for e in entries if "box_loss" in e]


def _ap(result: Result) -> str:
    return f"AP {result.figures['AP']:.3f}"
