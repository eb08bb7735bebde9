"""What a run leaves to look at while it goes on: `metrics.jsonl`, TensorBoard events, and the report."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.coco import CocoDataSet
from training.config import TrainConfig, to_dict
from training.report.anchor_fit import fit_anchors
from training.report.page import Report
from training.report.tensorboard import Scalars
from training.report.validation import Seen

log = logging.getLogger(__name__)


class Record:
    """Of the run in `out`, which has made `first_step` steps; says at once whether the anchors fit the training set."""

    def __init__(self, out: Path, config: TrainConfig, training_set: CocoDataSet, first_step: int) -> None:
        self._out = out
        self._scalars = Scalars(out, first_step)
        fit = fit_anchors(training_set, config.resize, config.model.level_anchors, config.loss)
        log.info("anchors: %s", fit.summary())
        names = {label.class_id: label.label for label in training_set.labels}
        self._report = Report(out, fit, names, to_dict(config))
        self._report.write()

    def add(self, entry: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl: `step` and figures."""
        with (self._out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self._scalars.write(entry)

    def close(self) -> None:
        """Close the event file; nothing can be added after it."""
        self._scalars.close()

    def add_evaluation(self, step: int, seen: Seen) -> None:
        """Its figures, and the report with what it saw."""
        ap, losses = seen.ap, seen.mean_losses
        self.add(
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
        self._report.write(seen)
