"""Class names as people have them, in a report's plots."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from training.evaluation.average_precision import ApReport
from training.report.plots import ap_by_class, drawn_names, precision_recall, scores_and_confusion

NAMES = [r"$\coin$", "a$b", "_private", "猫", "🐈", "x" * 150, "naïve", r"\frac{", "a^b_c", "%d"]


def test_names_keep_what_the_font_has_and_are_numbered_where_it_lacks_a_glyph() -> None:
    cut = "x" * 39 + "…"
    assert drawn_names(NAMES) == [
        r"\$\coin\$", r"a\$b", "_private", "class 4", "class 5", cut, "naïve", r"\frac{", "a^b_c", "%d",
    ]  # fmt: skip


def report(names: list[str]) -> ApReport:
    precision = np.full((10, 101, len(names), 4), 0.5)
    confusion = np.eye(len(names) + 1, dtype=np.int64)
    return ApReport(*[0.5] * 8, (0.5, 0.5, 0.5), dict.fromkeys(names, 0.5), 3, precision, confusion=confusion)


def test_plots_draw_every_name_without_a_warning() -> None:  # warnings are errors here
    for start in range(0, len(NAMES), 5):  # five have their names in the legend
        named = report(NAMES[start : start + 5])
        for content in (precision_recall(named), ap_by_class(named), scores_and_confusion(named)):
            Image.open(io.BytesIO(content)).verify()


def test_a_name_that_begins_with_an_underscore_is_in_the_legend(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def kept(figure: Figure, *arguments: object, **options: object) -> None:
        drawn.extend(text.get_text() for axes in figure.axes if (legend := axes.get_legend()) for text in legend.texts)

    monkeypatch.setattr(Figure, "savefig", kept)
    precision_recall(report(["_private", "b"]))
    assert {"_private", "b"} <= set(drawn)
