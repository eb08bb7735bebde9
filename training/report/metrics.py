"""The metrics of a running training: `metrics.jsonl`, TensorBoard events, the progress bar, and the report's page.

`tensorboard --logdir runs` shows the events, which are in `RUN/tensorboard/`.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.coco import CocoDataSet
from training.config import TrainConfig, to_dict
from training.loss.losses import Losses
from training.report.anchor_fit import fit_anchors
from training.report.page import Report
from training.report.validation import Validation

log = logging.getLogger(__name__)


class RunMetrics:
    """Writes the metrics of the run in `out`, which continues after `first_step` steps.

    The first output says whether the anchors fit the training set.
    """

    def __init__(self, out: Path, config: TrainConfig, training_set: CocoDataSet, first_step: int) -> None:
        self._file, self._log_every = out / "metrics.jsonl", config.log_every
        self._seconds = 0.0
        self._events = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)  # later ones are hidden
        fit = fit_anchors(training_set, config.resize, config.model.level_anchors, config.loss)
        log.info("anchors: %s", fit.summary())
        names = {label.class_id: label.label for label in training_set.labels}
        self._report = Report(out, fit, names, to_dict(config))
        self._report.write()
        self._progress = tqdm(total=config.steps, initial=first_step, desc=out.name, unit="step", smoothing=0.05)

    def close(self) -> None:
        """Close the event file and the progress bar; nothing can be added afterwards."""
        self._progress.close()
        self._events.close()

    def add_step(self, step: int, losses: Losses, rate: float, data_seconds: float, step_seconds: float) -> None:
        """Show a finished step, and write a line every `log_every` steps.

        rate          learning rate of the step
        data_seconds  spent waiting for the step's batch
        step_seconds  spent computing
        """
        self._progress.update()
        self._seconds += step_seconds
        if not self._log_every or step % self._log_every:
            return
        mean_seconds, self._seconds = self._seconds / self._log_every, 0.0
        classification, box = losses.classification.item(), losses.box.item()
        waiting = data_seconds / (data_seconds + mean_seconds)
        self._progress.set_postfix(
            cls=f"{classification:.3f}", box=f"{box:.3f}", lr=f"{rate:.1e}", data=f"{waiting:.0%}"
        )
        self._add(
            {
                "step": step,
                "classification_loss": classification,
                "box_loss": box,
                "learning_rate": rate,
                "data_seconds": round(data_seconds, 4),
                "step_seconds": round(mean_seconds, 4),
            }
        )

    def add_validation(self, step: int, validation: Validation) -> None:
        """Write the figures of a validation, and the page with its pictures."""
        ap, losses = validation.ap, validation.mean_losses
        self._add(
            {
                "step": step,
                "ap": ap.ap,
                "ap50": ap.ap50,
                "ap75": ap.ap75,
                "validation_classification_loss": losses.classification,
                "validation_box_loss": losses.box,
                "pictures": ap.num_images,
            }
        )
        self._report.write(validation)

    def _add(self, entry: Mapping[str, Any]) -> None:
        """Write a line of metrics.jsonl, and its values as events under `train/` or `validation/`."""
        with self._file.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        group = "validation" if "ap" in entry else "train"
        for name, value in entry.items():
            if name != "step":
                self._events.add_scalar(f"{group}/{name.removeprefix('validation_')}", value, entry["step"])
        self._events.flush()
