"""The page of a run, `RUN/report/index.html`: a single file with its plots, which are also files in that folder.

It is written before the first step, with the anchors' fit, and after each validation, from `metrics.jsonl` and the
validation. Each file gets its name when it is complete, so the page can be opened at any moment of a run.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from model.files import write_whole
from training.evaluation.average_precision import ApReport
from training.evaluation.scores import calibration_error
from training.report.anchor_fit import AnchorFit
from training.report.plots import (
    FOUND,
    MISSED,
    SHOWN_SCORE,
    WRONG,
    anchors_and_objects,
    ap_by_class,
    detections_and_truth,
    precision_recall,
    scores_and_confusion,
    training_curves,
)
from training.report.validation import ShownPicture, Validation

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
img { max-width: 100%; height: auto } figure { margin: 0 } figcaption { font-size: .85rem; color: #555 }
table { border-collapse: collapse } th, td { padding: .15rem .9rem .15rem 0; text-align: right }
th:first-child, td:first-child { text-align: left } th { border-bottom: 1px solid #ccc; font-weight: 600 }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); gap: 1rem }
.key { color: white; padding: 0 .4rem; border-radius: .2rem } pre { white-space: pre-wrap; font-size: .85rem }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{style}</style></head>
<body>
<h1>{title}</h1>
{body}
</body></html>
"""


class Report:
    """The report of the run in `out`."""

    def __init__(self, out: Path, fit: AnchorFit, names: Mapping[int, str], settings: Mapping[str, Any]) -> None:
        """Begin a report. `names` are those of the category ids; `settings` is the configuration."""
        self._out, self._fit, self._names, self._settings = out, fit, names, settings
        self._fit_image = anchors_and_objects(fit)

    def write(self, validation: Validation | None = None) -> None:
        """Write the page again, with the last validation."""
        folder = self._out / "report"
        folder.mkdir(parents=True, exist_ok=True)
        entries = read_metrics(self._out / "metrics.jsonl")
        sections: list[str] = []
        if validation is not None:
            sections += [_figures(validation.ap), *_curves(folder, entries, validation.ap)]
            sections += _pictures(folder, validation.pictures, self._names)
        settings = json.dumps(self._settings, indent=1)
        sections += [
            "<h2>Do the anchors fit?</h2>",
            f"<p>{escape(self._fit.summary())}.</p>",
            _image(folder, "anchors.png", self._fit_image, "objects on their canvases"),
            f"<details><summary>in figures</summary><pre>{escape(self._fit.table())}</pre></details>",
            "<h2>Settings</h2>",
            f"<details><summary>all values</summary><pre>{escape(settings)}</pre></details>",
        ]
        title = f"{self._out.name}: {_state(entries, validation)}"
        page = PAGE.format(title=escape(title), style=STYLE, body="\n".join(sections))
        write_whole(folder / "index.html", page.encode())


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl; of a step that a resumed run repeated, the last line counts."""
    lines = file.read_text().splitlines() if file.exists() else []
    entries: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in lines:
        with suppress(json.JSONDecodeError):  # a killed run may leave half a line before those of the resumed run
            entry = json.loads(line)
            entries[entry["step"], "ap" in entry] = entry
    return [entries[key] for key in sorted(entries)]


def _state(entries: Sequence[Mapping[str, Any]], validation: Validation | None) -> str:
    if validation is None:
        return "before its first evaluation"
    return f"AP {validation.ap.ap:.3f} on {validation.ap.num_images} pictures after {entries[-1]['step']:,} steps"


def _figures(ap: ApReport) -> str:
    columns = {
        "AP@[0.50:0.95]": ap.ap,
        "AP50": ap.ap50,
        "AP75": ap.ap75,
        "small": ap.ap_small,
        "medium": ap.ap_medium,
        "large": ap.ap_large,
        "recall at 100": ap.recall_100,
    }
    heads = "".join(f"<th>{escape(name)}</th>" for name in columns)
    cells = "".join(f"<td>{value:.3f}</td>" for value in columns.values())
    return f"<table><tr>{heads}</tr><tr>{cells}</tr></table>"


def _operating_point(ap: ApReport) -> str:
    if ap.best is None:
        return "Nothing is found at any score."
    return (
        f"Best F1 {ap.best.f1:.3f} at score > {ap.best.threshold:.3f}: precision {ap.best.precision:.3f}, recall "
        f"{ap.best.recall:.3f} at IoU 0.5. Calibration error {calibration_error(ap.calibration):.3f}."
    )


def _classes(ap: ApReport) -> str:
    """Make the table of classes by their numbers in the plots: AP, and the class's own best F1."""
    rows = []
    for number, (name, value) in enumerate(ap.per_class.items(), start=1):
        point = ap.best_by_class[number - 1]
        best = ("", "") if point is None else (f"{point.f1:.3f}", f"{point.threshold:.3f}")
        cells = "".join(f"<td>{cell}</td>" for cell in (f"{value:.3f}", *best))
        rows.append(f"<tr><td>{number} {escape(name)}</td>{cells}</tr>")
    heads = "<tr><th>class</th><th>AP@[0.50:0.95]</th><th>best F1</th><th>at score &gt;</th></tr>"
    return f"<details><summary>in figures</summary><table>{heads}{''.join(rows)}</table></details>"


def _pictures(folder: Path, pictures: Sequence[ShownPicture], names: Mapping[int, str]) -> list[str]:
    keys = ((FOUND, "found"), (WRONG, "wrong place or class"), (MISSED, "missed"))
    legend = " ".join(f'<span class="key" style="background:{colour}">{text}</span>' for colour, text in keys)
    images = [
        _image(folder, f"picture-{number:02}.jpg", detections_and_truth(shown, names), shown.name)
        for number, shown in enumerate(pictures, start=1)
    ]
    return [
        "<h2>Validation pictures</h2>",
        f"<p>Detections of score {SHOWN_SCORE:g} or more: {legend}</p>",
        f'<div class="pictures">{"".join(images)}</div>',
    ]


def _curves(folder: Path, entries: Sequence[Mapping[str, Any]], ap: ApReport) -> list[str]:
    return [
        "<h2>Training</h2>",
        _image(
            folder,
            "training.png",
            training_curves(entries),
            "dashed: validation, on whole pictures without augmentation",
        ),
        "<h2>Precision and recall</h2>",
        _image(folder, "precision-recall.png", precision_recall(ap), "COCO's: 101 recalls, 100 detections"),
        "<h2>Scores</h2>",
        f"<p>{escape(_operating_point(ap))}</p>",
        _image(folder, "scores.png", scores_and_confusion(ap), "rows: true classes; columns: found classes"),
        "<h2>Classes and sizes</h2>",
        _classes(ap),
        _image(folder, "ap.png", ap_by_class(ap), "small is below 32² pixels of the picture, large above 96²"),
    ]


def _image(folder: Path, name: str, content: bytes, caption: str) -> str:
    """Write the picture as a file, and return it for the page."""
    write_whole(folder / name, content)
    media_type = "image/png" if name.endswith(".png") else "image/jpeg"
    data = base64.b64encode(content).decode()
    alt = escape(name.partition(".")[0])
    return (
        f'<figure><img alt="{alt}" src="data:{media_type};base64,{data}"><figcaption>{escape(caption)}</figcaption>'
        "</figure>"
    )
