"""The plots of the ablations' page, written as PNG files without a display."""

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure

from training.ablations.claims import figure_of
from training.ablations.loss_shares import cumulative_share, examples, loss_of_each, share_of_hardest
from training.ablations.runs import Result
from training.checkpoint import build_detector, load_checkpoint
from training.coco import CocoDataSet

GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
SHARES_OF = 50
"""Validation pictures whose anchors give the cumulative shares."""
LARGEST_LOSS_SHOWN = 3e4
"""Largest loss in the plot; a curve that leaves it has diverged."""


def plot_shares(checkpoint_file: Path, validation_set: CocoDataSet, file: Path) -> str:
    """Plot the paper's figure 4, and return a table of the hardest hundredth's share."""
    checkpoint = load_checkpoint(checkpoint_file)
    config = checkpoint.config
    found = examples(build_detector(checkpoint), validation_set, config.resize, config.loss, limit=SHARES_OF)
    figure = Figure(figsize=(9, 3.6))
    axes = figure.subplots(1, 2, sharey=True)
    num_pictures = min(SHARES_OF, len(validation_set))
    lines = [
        f"The plots show the cumulative share of the loss, easiest examples first, of the baseline's model on "
        f"{num_pictures} pictures: {len(found.foreground):,} foreground and {len(found.background):,} background "
        "examples. The hardest hundredth of the examples has this share:",
        "",
        "| γ | of the foreground's loss | of the background's loss |",
        "|---|---|---|",
    ]
    for gamma in GAMMAS:
        cells = []
        for axis, logits, foreground in zip(axes, (found.foreground, found.background), (True, False), strict=True):
            shares = cumulative_share(loss_of_each(logits, foreground=foreground, gamma=gamma))
            cells.append(f"{share_of_hardest(shares, 0.01):.1%}")
            shown = torch.linspace(0, len(shares) - 1, min(500, len(shares))).long()
            axis.plot((shown + 1) / len(shares), shares[shown], label=f"γ {gamma:g}")
        lines.append(f"| {gamma:g} | {' | '.join(cells)} |")
    for axis, kind in zip(axes, ("foreground", "background"), strict=True):
        axis.set(title=kind, xlabel=f"share of the {kind} examples, easiest first")
    axes[0].set_ylabel("share of the loss")
    axes[0].legend()
    _save(figure, file)
    return "\n".join(lines)


def plot_prior(losses: Mapping[str, Mapping[int, float]], file: Path) -> None:
    names = ("baseline", "no-prior", "cross-entropy", "cross-entropy-no-prior", "sgd", "sgd-no-prior",
             "sgd-cross-entropy-no-prior")  # fmt: skip
    curves = {name: [(s, loss) for s, loss in losses[name].items() if s <= 100] for name in names if losses[name]}
    if not curves:
        return
    figure = Figure(figsize=(7, 3.6))
    axis = figure.subplots()
    for name, curve in curves.items():
        axis.plot(*zip(*curve, strict=True), label=name, linestyle="--" if "no-prior" in name else "-")
    axis.set(yscale="log", xlabel="step", ylabel="loss", title="the first 100 steps; dashed: without the prior")
    axis.set_ylim(top=min(axis.get_ylim()[1], LARGEST_LOSS_SHOWN))
    axis.legend(fontsize="small")
    _save(figure, file)


def plot_pyramids(results: Mapping[str, Result], file: Path) -> None:
    names = ("baseline", "rough", "top", "image-pyramid", "top-image-pyramid")
    shown = [results[name] for name in names if name in results and results[name].figures]
    if not shown:
        return
    sizes = ("AP small", "AP medium", "AP large")
    figure = Figure(figsize=(7, 3.6))
    axis = figure.subplots()
    width = 0.8 / len(shown)
    for index, result in enumerate(shown):
        heights = [figure_of(result, {}, size) or 0.0 for size in sizes]
        label = f"{result.name}, {1000 * result.seconds_per_picture:.0f} ms"
        axis.bar([place + index * width for place in range(len(sizes))], heights, width, label=label)
    axis.set_ylim(bottom=0)
    axis.set_xticks([place + 0.4 - width / 2 for place in range(len(sizes))], sizes)
    axis.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=90)
