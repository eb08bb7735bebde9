"""The plots of a report, as PNG or JPEG: curves, precision and recall, anchors, detections and truth.

matplotlib is used through its objects, without a display and without `pyplot`'s global state.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from training.evaluation.average_precision import ApReport
from training.report.anchor_fit import AnchorFit
from training.report.validation import ShownPicture

Entry = Mapping[str, Any]
"""A line of metrics.jsonl."""
FOUND, WRONG, MISSED = "#2ca02c", "#d62728", "#ff9f1c"
"""Colours of a correct detection, a wrong one, and a missed object."""
BLUE, GREY = "#1f77b4", "#b0b0b0"
SHOWN_SCORE = 0.3
"""Least score of a detection that is drawn."""
SHOWN_IOU = 0.5
NAMED_CLASSES = 5
"""Classes with a named curve in the plot of all classes: the worst ones."""
LONGEST_SIDE = 640
"""Longest side of a picture in the report, pixels."""
NAMED_CONFUSIONS = 12
"""Most classes for which the confusion shows names and counts."""
LONGEST_NAME = 40
"""Most characters of a class's name in a plot."""
JPEG_QUALITY = 85


def drawn_names(names: Sequence[str]) -> list[str]:
    """Adapt names to plots: no mark-up, truncated if long, a number instead if the font lacks a glyph."""
    glyphs = get_font(findfont("DejaVu Sans")).get_charmap()
    return [
        (name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…").replace("$", r"\$")
        if all(ord(character) in glyphs for character in name)
        else f"class {number}"
        for number, name in enumerate(names, start=1)
    ]


def training_curves(entries: Sequence[Entry]) -> bytes:
    """Plot losses, AP and learning rate over the steps."""
    figure, (losses, ap, rate) = _axes(3)
    for axes, name in ((losses, "loss"), (ap, "AP"), (rate, "learning rate")):
        axes.set(title=name, xlabel="step")
    for key, colour, name in (("classification_loss", BLUE, "classification"), ("box_loss", MISSED, "box")):
        losses.plot(*_series(entries, key), color=colour, linewidth=1, label=name)
        steps, values = _series(entries, f"validation_{key}")
        losses.plot(steps, values, color=colour, linestyle="--", marker="o", label=f"{name}, validation")
    for key, name in (("ap", "AP@[0.50:0.95]"), ("ap50", "AP50")):
        ap.plot(*_series(entries, key), marker="o", label=name)
    rate.plot(*_series(entries, "learning_rate"))
    ap.set_ylim(0, 1)
    losses.set_ylim(bottom=0)
    for axes in (losses, ap):
        axes.legend(frameon=False)
    return _png(figure)


def precision_recall(report: ApReport) -> bytes:
    """Plot the mean over classes at five IoUs, and every class at IoU 0.5, the worst ones named: 100 detections, all
    sizes."""
    figure, (mean, classes) = _axes(2)
    recall = np.linspace(0, 1, report.precision.shape[1])
    known = [column for column in range(report.precision.shape[2]) if report.precision[0, 0, column, 0] > -1]
    for iou_index in range(0, 10, 2):
        curves = report.precision[iou_index, :, known, 0]
        if len(known):
            mean.plot(recall, curves.mean(axis=0), label=f"IoU {0.5 + 0.05 * iou_index:.2f}")
    names = drawn_names(list(report.per_class))
    at_half = {column: report.precision[0, :, column, 0] for column in known}
    by_area = sorted(known, key=lambda column: float(at_half[column].mean()))
    for column in reversed(by_area):
        named = column in by_area[:NAMED_CLASSES]
        colour, width = (None, 1.5) if named else (GREY, 0.8)
        classes.plot(recall, at_half[column], color=colour, linewidth=width, label=names[column] if named else None)
    mean.set(title="mean over classes")
    classes.set(title="each class at IoU 0.50" + (", the worst named" if len(known) > NAMED_CLASSES else ""))
    for axes in (mean, classes):
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        lines = [line for line in axes.lines if line.get_color() != GREY]
        if lines:  # given by hand: matplotlib leaves out labels that begin with _
            axes.legend(lines, [str(line.get_label()) for line in lines], frameon=False)
    return _png(figure)


def ap_by_class(report: ApReport) -> bytes:
    """Plot a bar for each class, best first, and AP of small, medium and large objects."""
    names = drawn_names(list(report.per_class))
    values = zip(names, report.per_class.values(), strict=True)
    known = sorted(((name, value) for name, value in values if not np.isnan(value)), key=lambda item: item[1])
    figure = Figure(figsize=(11, max(3.2, 0.6 + 0.22 * len(known))), layout="constrained")
    classes, sizes = figure.subplots(1, 2, width_ratios=(2, 1))
    _bars(classes, [name for name, _ in known], [value for _, value in known])
    _bars(
        sizes,
        ["large", "medium", "small"],
        [0 if np.isnan(value) else value for value in (report.ap_large, report.ap_medium, report.ap_small)],
    )
    classes.set(title="AP@[0.50:0.95] by class", xlim=(0, 1))
    sizes.set(title="by size", xlim=(0, 1))
    return _png(figure)


def scores_and_confusion(report: ApReport) -> bytes:
    """Plot precision by score, and the confusion of classes at the threshold of the best F1."""
    figure, (calibrated, confused) = _axes(2)
    calibrated.plot([0, 1], [0, 1], color=GREY, linestyle="--")
    calibrated.plot([b.mean_score for b in report.calibration], [b.precision for b in report.calibration], marker="o")
    calibrated.set(title="calibration", xlabel="score", ylabel="share that finds an object", xlim=(0, 1), ylim=(0, 1))
    confused.grid(visible=False)
    if report.confusion is not None:
        shares = report.confusion / np.maximum(report.confusion.sum(axis=1, keepdims=True), 1)
        confused.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        names = [*drawn_names(list(report.per_class)), "background"]
        if len(names) <= NAMED_CONFUSIONS:
            confused.set_xticks(range(len(names)), [*map(str, range(1, len(names))), "none"])
            confused.set_yticks(range(len(names)), [f"{name} {row}" for row, name in enumerate(names, start=1)])
            for (row, column), count in np.ndenumerate(report.confusion):
                colour = "white" if shares[row, column] > 0.5 else "black"
                confused.text(column, row, f"{count:,}", ha="center", va="center", fontsize=8, color=colour)
    confused.set(title="confusion at the best F1", xlabel="found", ylabel="there")
    return _png(figure)


def anchors_and_objects(fit: AnchorFit) -> bytes:
    """Plot the fit of the best anchor, over all objects and by their side, and the levels of positive anchors."""
    figure, (overlap, sides, levels) = _axes(3)
    overlap.hist(fit.best.iou, bins=40, range=(0, 1), color=BLUE)
    overlap.axvline(fit.threshold, color=WRONG, linestyle="--", label=f"positive from IoU {fit.threshold:g}")
    overlap.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 1.0))
    overlap.set(title="IoU of each object's best anchor", xlabel="IoU", ylabel="objects", xlim=(0, 1))
    rows = list(fit.by_side())[::-1]
    _bars(sides, [f"{name} ({count:,})" for name, count, _, _ in rows], [recall for _, _, recall, _ in rows])
    sides.set(title=f"with an anchor at IoU {fit.threshold:g}, by side", xlim=(0, 1))
    by_level = list(fit.by_level())[::-1]
    _bars(levels, [name for name, _, _ in by_level], [positives for _, _, positives in by_level])
    levels.set(title="positive anchors a picture")
    levels.margins(x=0.15)
    return _png(figure)


def detections_and_truth(shown: ShownPicture, names: Mapping[int, str]) -> bytes:
    """Draw detections from SHOWN_SCORE on, as FOUND or WRONG, and MISSED objects, as JPEG."""
    boxes, scores, ids = shown.detections.boxes, shown.detections.scores, shown.detections.labels
    drawn = scores >= SHOWN_SCORE
    boxes, scores, ids = boxes[drawn], scores[drawn], ids[drawn]
    matched = matches(boxes, ids, shown.target.boxes, shown.target_ids)
    height, width = shown.pixels.shape[:2]
    scale = min(1.0, LONGEST_SIDE / max(height, width))
    picture = Image.fromarray(shown.pixels).resize((max(1, round(width * scale)), max(1, round(height * scale))))
    pen = ImageDraw.Draw(picture)
    for index in sorted(set(range(len(shown.target.boxes))) - set(matched.tolist())):
        _box(pen, shown.target.boxes[index] * scale, names.get(int(shown.target_ids[index]), "?"), MISSED)
    for box, score, class_id, truth in reversed(list(zip(boxes, scores, ids, matched, strict=True))):
        _box(pen, box * scale, f"{names.get(int(class_id), '?')} {score:.2f}", FOUND if truth >= 0 else WRONG)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def matches(
    boxes: NDArray[np.float32], ids: NDArray[np.int64], truth: NDArray[np.float32], truth_ids: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the object that each detection, best first, finds (same class, IoU of SHOWN_IOU or more), or -1. An object
    is found once."""
    found = np.full(len(boxes), -1)
    free = np.ones(len(truth), bool)
    for index, (box, class_id) in enumerate(zip(boxes, ids, strict=True)):
        low, high = np.maximum(box[:2], truth[:, :2]), np.minimum(box[2:], truth[:, 2:])
        intersection = (high - low).clip(0).prod(axis=1)
        area, areas = (box[2:] - box[:2]).prod(), (truth[:, 2:] - truth[:, :2]).prod(axis=1)
        iou = intersection / (area + areas - intersection)
        iou[~free | (truth_ids != class_id)] = 0
        if len(iou) and iou.max() >= SHOWN_IOU:
            found[index] = iou.argmax()
            free[found[index]] = False
    return found


def _series(entries: Sequence[Entry], key: str) -> tuple[list[int], list[float]]:
    chosen = [entry for entry in entries if key in entry]
    return [entry["step"] for entry in chosen], [entry[key] for entry in chosen]


def _axes(count: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, count)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.3)
    return figure, axes


def _bars(axes: Axes, names: Sequence[str], values: Sequence[float]) -> None:
    bars = axes.barh(range(len(names)), values, color=BLUE)
    axes.set_yticks(range(len(names)), names)
    axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()


def _box(pen: ImageDraw.ImageDraw, box: NDArray[np.float32], text: str, colour: str) -> None:
    x1, y1, x2, y2 = box.tolist()
    pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=2)
    font = ImageFont.load_default(13)
    left, top, right, bottom = pen.textbbox((x1 + 2, max(0, y1 - 15)), text, font=font)
    pen.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=colour)
    pen.text((x1 + 2, max(0, y1 - 15)), text, fill="white", font=font)
