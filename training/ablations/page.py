"""What the rows of `training.ablations.runs` say about the article's claims: a page in the article's order, with plots.

Writes ARTICLE.md and figures/*.png into a folder, and OUT/log.md, a table for the log of runs. Every figure comes from
OUT/results.jsonl, the rows' run folders, or the loss itself. Whether a claim shows is decided here by its comparison,
against what another seed alone changes; a row that was not run is said to be not run.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window
import matplotlib.pyplot as plt
import torch

from training.ablations.loss_shares import cumulative_share, examples, loss_of_each, share_of_hardest
from training.ablations.runs import FIGURES, ROWS, Result, read_losses, read_results
from training.checkpoint import build_detector, load_checkpoint
from training.coco import CocoDataSet
from training.losses import focal_loss_sum
from training.presets import PRESETS

GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
SHARES_OF = 50
"""Validation pictures whose anchors the cumulative shares are taken from."""
LARGEST_LOSS_SHOWN = 3e4
"""A curve that leaves the plot has diverged."""
SCENARIOS = (("easy, right", 0.9), ("wrong", 0.1), ("very easy, right", 0.99))
"""The article's, with the probability that the detector gives to what is true."""
GAMMAS_CAVEAT = (
    "In the paper γ 0.5 to 2 differ by 1.1 AP after 90,000 steps; a few hundred may favour the larger gradients."
)
BOUNDED_STEPS = "AdamW and clipping bound each step, whatever the loss."
ONE_CLASS = "Here everything is one class, and a picture has about 12,000 anchors, not 100,000 in 80 classes."


@dataclass(frozen=True)
class Claim:
    """That one row's figure is above another's."""

    text: str
    better: str
    worse: str
    figure: str
    caveat: str = ""
    """Why it may not show on this data."""


@dataclass(frozen=True)
class Part:
    title: str
    text: str
    rows: tuple[str, ...]
    claims: tuple[Claim, ...]
    figures: tuple[str, ...] = ("AP", "AP50", "AP small", "AP medium", "AP large")
    plot: str = ""


PARTS = (
    Part(
        "Proposals: the RPN, and what a single feature map costs it",
        "The region proposal network is the same code with other values: one class, one anchor size for each level, a "
        "head of one shared 3×3 convolution, labels by IoU 0.7 and 0.3 and the best anchor, 256 sampled anchors, none "
        "across the border. Its figure is average recall: the share of objects that 100 or 1,000 proposals find, over "
        "IoU .50 to .95.",
        ("rpn", "rpn-top"),
        (
            Claim(
                "A map after much subsampling cannot find small objects; a pyramid can", "rpn", "rpn-top",
                "AR@1000 small",
            ),
            Claim("The pyramid's proposals are better over all sizes", "rpn", "rpn-top", "AR@1000"),
        ),
        ("AR@100", "AR@1000", "AR@1000 small", "AR@1000 medium", "AR@1000 large"),
    ),
    Part(
        "Pyramids: of features, of pictures, and the rough one",
        "The heads look at P3 to P7 (the baseline), at the same levels without the top-down path, or at P5 alone with "
        "the anchors of all levels. The image pyramid runs a trained model on several sizes of a picture and merges "
        "what it finds by one NMS.",
        ("baseline", "top", "rough", "image-pyramid", "top-image-pyramid"),
        (
            Claim("The feature pyramid beats the top level alone", "baseline", "top", "AP"),
            Claim("Most of all for small objects", "baseline", "top", "AP small"),
            Claim(
                "The top-down path brings meaning to the high-resolution levels", "baseline", "rough", "AP small",
                "Shapes are told from their ground by edges and texture, which low levels know: the semantic gap that "
                "the article speaks of is small here.",
            ),
            Claim("An image pyramid helps a single feature map", "top-image-pyramid", "top", "AP"),
            Claim("An image pyramid is costly", "image-pyramid", "baseline", "ms per picture"),
        ),
        plot="pyramids.png",
    ),
    Part(
        "Focal loss",
        "The same model, data and schedule; only the loss of the classes differs. Plain cross-entropy gives every "
        "anchor the weight 1. With γ the paper's own best α goes (its table 1b): .75 for 0, .5 for 0.5, .25 above.",
        ("baseline", "cross-entropy", "balanced", "sampled", "gamma-0.5", "gamma-1", "gamma-5"),
        (
            Claim("Focal loss beats cross-entropy", "baseline", "cross-entropy", "AP", ONE_CLASS),
            Claim("Focal loss beats α-balanced cross-entropy", "baseline", "balanced", "AP", ONE_CLASS),
            Claim("Focal loss beats the sampling of 128 and 128 anchors", "baseline", "sampled", "AP", ONE_CLASS),
            Claim("γ 2 beats γ 0.5", "baseline", "gamma-0.5", "AP", GAMMAS_CAVEAT),
            Claim("γ 2 beats γ 1", "baseline", "gamma-1", "AP", GAMMAS_CAVEAT),
            Claim("γ 2 beats γ 5", "baseline", "gamma-5", "AP", "In the paper γ 2 and 5 differ by 1.8 AP."),
        ),
        plot="shares.png",
    ),
    Part(
        "Training RetinaNet: the prior",
        "With the prior off, every anchor starts at probability .5. The rows of the preset have AdamW, clipped "
        "gradients, warm-up and batch norm in the heads, which all forgive a bad start; those called `sgd` have the "
        "paper's bare SGD, without warm-up, for 100 steps.",
        (
            "baseline", "no-prior", "cross-entropy", "cross-entropy-no-prior", "sgd", "sgd-no-prior",
            "sgd-cross-entropy-no-prior",
        ),
        (
            Claim("Without the prior the first loss is far larger", "no-prior", "baseline", "first loss"),
            Claim("And with plain cross-entropy", "cross-entropy-no-prior", "cross-entropy", "first loss"),
            Claim(
                "Without the prior training ends worse", "baseline", "no-prior", "AP",
                BOUNDED_STEPS,
            ),
            Claim(
                "With cross-entropy, too", "cross-entropy", "cross-entropy-no-prior", "AP",
                BOUNDED_STEPS,
            ),
            Claim(
                "With cross-entropy and bare SGD it does not survive", "sgd", "sgd-cross-entropy-no-prior", "AP"
            ),
        ),
        plot="prior.png",
    ),
    Part(
        "The box regression subnet: smooth-L1 with σ 3",
        "Three losses of the same boxes. GIoU keeps its weight of 1; its scale is its own.",
        ("baseline", "l1", "giou"),
        (
            Claim("Smooth-L1 with σ 3 is as good as L1 or better", "baseline", "l1", "AP"),
            Claim("GIoU, which came after the article, is better at high IoU", "giou", "baseline", "AP75"),
        ),
        ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large"),
    ),
)  # fmt: skip


def write_page(out: Path, page: Path, validation_set: CocoDataSet) -> None:
    """ARTICLE.md and its plots in the folder `page`, and OUT/log.md."""
    results = {result.name: result for result in read_results(out)}
    losses = {row.name: dict(read_losses(out, row.name)) for row in ROWS}
    plots = page / "figures"
    plots.mkdir(parents=True, exist_ok=True)
    shares = ""
    if (out / "baseline" / "best.pt").exists():
        shares = _plot_shares(out / "baseline" / "best.pt", validation_set, plots / "shares.png")
    _plot_prior(losses, plots / "prior.png")
    _plot_pyramids(results, plots / "pyramids.png")
    sections = [_introduction(results)]
    for number, part in enumerate(PARTS, start=1):
        sections.append(_section(number, part, results, losses, plots))
        if part.plot == "shares.png":
            sections += [scenario_table(), shares]
    (page / "ARTICLE.md").write_text("\n\n".join(section for section in sections if section) + "\n")
    (out / "log.md").write_text(log_table(results) + "\n")


def scenario_table() -> str:
    """The article's three scenarios, computed by the loss that trains."""
    lines = [
        "The article's three scenarios, by the loss itself (α .25, γ 2; p is the probability given to the truth; "
        "background has the weight 1 - α, which the article forgets):",
        "",
        "| example | p | cross-entropy | focal, foreground | times smaller | focal, background | times smaller |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, probability in SCENARIOS:
        entropy = loss_of(probability, foreground=True, alpha=-1, gamma=0)
        foreground = loss_of(probability, foreground=True, alpha=0.25, gamma=2)
        background = loss_of(1 - probability, foreground=False, alpha=0.25, gamma=2)
        lines.append(
            f"| {name} | {probability} | {entropy:.5f} | {foreground:.5g} | {entropy / foreground:,.0f} | "
            f"{background:.5g} | {entropy / background:,.0f} |"
        )
    return "\n".join(lines)


def loss_of(probability: float, *, foreground: bool, alpha: float, gamma: float) -> float:
    """Of one anchor to which the detector gives this probability of foreground."""
    logit = torch.logit(torch.tensor([[probability]], dtype=torch.float64))
    positive = torch.zeros(int(foreground), dtype=torch.int64)
    return focal_loss_sum(logit, (positive, positive), torch.tensor([False]), alpha=alpha, gamma=gamma).item()


def log_table(results: Mapping[str, Result]) -> str:
    lines = ["| row | steps | AP | AP50 | minutes | machine | commit |", "|---|---|---|---|---|---|---|"]
    for result in results.values():
        ap, ap50 = (_figure(result, {}, name) for name in ("AP", "AP50"))
        lines.append(
            f"| {result.name} | {result.steps} | {_number(ap)} | {_number(ap50)} | {result.minutes:.1f} | "
            f"{result.machine} | {result.commit} |"
        )
    return "\n".join(lines)


def verdict(claim: Claim, results: Mapping[str, Result], losses: Mapping[str, Mapping[int, float]]) -> str:
    """In words: it shows, it does not (and why that may be), it cannot be told from chance, or it was not run."""
    better, worse = results.get(claim.better), results.get(claim.worse)
    if better is None or worse is None:
        missing = [name for name in (claim.better, claim.worse) if name not in results]
        return f"not run: {', '.join(missing)}"
    if claim.figure.startswith(("AP", "AR")) and (better.failure or worse.failure):
        failed = " and ".join(result.name for result in (better, worse) if result.failure)
        return f"{'shows' if worse.failure and not better.failure else 'does not show'}: {failed} did not survive"
    one, other = (_figure(result, losses.get(result.name, {}), claim.figure) for result in (better, worse))
    if one is None or other is None:
        return f"cannot be told: there is no {claim.figure}"
    chance = _chance(results, claim.figure)
    compared = f"{claim.figure} {_number(one)} against {_number(other)}"
    if one - other > (chance or 0):
        return f"**shows**: {compared}" + ("" if chance is not None else ", one seed each")
    if chance is not None and abs(one - other) <= chance:
        return (
            f"cannot be told from chance (another seed changes {_number(chance)}): {compared}. {claim.caveat}".strip()
        )
    return f"**does not show**: {compared}. {claim.caveat}".strip()


def _chance(results: Mapping[str, Result], figure: str) -> float | None:
    """What another seed changed in the baseline; None where that is not known or not a matter of seeds."""
    pair = [results.get(name) for name in ("baseline", "baseline-again")]
    figures = [_figure(result, {}, figure) for result in pair if result is not None]
    known = [value for value in figures if value is not None]
    return abs(known[0] - known[1]) if len(known) == 2 and figure in FIGURES else None


def _figure(result: Result, losses: Mapping[int, float], name: str) -> float | None:
    if name == "first loss":
        return losses.get(1)
    if name == "ms per picture":
        return 1000 * result.seconds_per_picture if result.figures else None
    value = result.figures.get(name)
    return None if value is None or math.isnan(value) else value  # NaN: the data set has no such objects


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.0f}"


def _introduction(results: Mapping[str, Result]) -> str:
    preset = PRESETS["ablation"]
    baseline = results.get("baseline")
    steps = preset.steps if baseline is None else baseline.steps
    pictures = "" if baseline is None else f"{baseline.num_pictures} "
    return f"""# The article's claims, on data

`make article` writes this page: small training runs that differ in one value each, in the order of the article (*The
intuition behind RetinaNet*). It goes on where it was stopped. {_status(results)}

All runs: {preset.model.describe()}; {steps} steps (unless said) of {preset.batch_size} crops of
{preset.augment.crop_sizes[0]} px, from scratch, on the demo data set (`python -m training demo`) with a shorter side of
{preset.resize.shorter_side} px, **every object of one class**: whether there is an object is what a detector learns
first, and these runs are short. AP is COCO's on the {pictures}validation pictures. One seed each; what another seed
changes is the measure of chance: {_chance_sentence(results)} Milliseconds per picture are the median from pixels to
detections."""


def _status(results: Mapping[str, Result]) -> str:
    """How much of it was run, where, from what."""
    if not results:
        return f"**None of the {len(ROWS)} rows has been run.**"
    missing = [row.name for row in ROWS if row.name not in results]
    machines = sorted({result.machine for result in results.values()})
    commits = sorted({result.commit for result in results.values()})
    minutes = sum(result.minutes for result in results.values())
    run = f"{len(results)} of {len(ROWS)} rows were run, in {minutes:.0f} minutes, on {'; '.join(machines)}"
    not_run = f" **Not run: {', '.join(missing)}.**" if missing else ""
    return f"{run}, at commit {', '.join(commits)}.{not_run}"


def _chance_sentence(results: Mapping[str, Result]) -> str:
    chance = _chance(results, "AP")
    return "not run." if chance is None else f"{_number(chance)} AP between `baseline` and `baseline-again`."


def _section(
    number: int, part: Part, results: Mapping[str, Result], losses: Mapping[str, Mapping[int, float]], plots: Path
) -> str:
    lines = [f"## {number}. {part.title}", "", part.text, ""]
    lines += [f"| row | what | {' | '.join(part.figures)} | ms per picture |", "|---" * (len(part.figures) + 3) + "|"]
    changes = {row.name: row.change for row in ROWS}
    for name in part.rows:
        result = results.get(name)
        if result is None:
            cells = ["not run", *[""] * len(part.figures)]
        elif result.failure:
            cells = [f"did not survive: {result.failure}", *[""] * len(part.figures)]
        else:
            cells = [_number(_figure(result, {}, figure)) for figure in (*part.figures, "ms per picture")]
        lines.append(f"| `{name}` | {changes[name]} | {' | '.join(cells)} |")
    lines.append("")
    lines += [f"- {claim.text}: {verdict(claim, results, losses)}" for claim in part.claims]
    if part.plot and (plots / part.plot).exists():
        lines += ["", f"![{part.title}](figures/{part.plot})"]
    return "\n".join(lines)


def _plot_shares(checkpoint_file: Path, validation_set: CocoDataSet, file: Path) -> str:
    """The paper's figure 4, and in words what the hardest hundredth makes."""
    checkpoint = load_checkpoint(checkpoint_file)
    config = checkpoint.config
    found = examples(build_detector(checkpoint), validation_set, config.resize, config.loss, limit=SHARES_OF)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    num_pictures = min(SHARES_OF, len(validation_set))
    lines = [
        f"The cumulative share of the loss, easiest first, by the baseline's model on {num_pictures} pictures, "
        f"{len(found.foreground):,} foreground and {len(found.background):,} background examples. What the hardest "
        "hundredth makes:",
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


def _plot_prior(losses: Mapping[str, Mapping[int, float]], file: Path) -> None:
    names = ("baseline", "no-prior", "cross-entropy", "cross-entropy-no-prior", "sgd", "sgd-no-prior",
             "sgd-cross-entropy-no-prior")  # fmt: skip
    curves = {name: [(s, loss) for s, loss in losses[name].items() if s <= 100] for name in names if losses[name]}
    if not curves:
        return
    figure, axis = plt.subplots(figsize=(7, 3.6))
    for name, curve in curves.items():
        axis.plot(*zip(*curve, strict=True), label=name, linestyle="--" if "no-prior" in name else "-")
    axis.set(yscale="log", xlabel="step", ylabel="loss", title="the first 100 steps; dashed: without the prior")
    axis.set_ylim(top=min(axis.get_ylim()[1], LARGEST_LOSS_SHOWN))
    axis.legend(fontsize="small")
    _save(figure, file)


def _plot_pyramids(results: Mapping[str, Result], file: Path) -> None:
    names = ("baseline", "rough", "top", "image-pyramid", "top-image-pyramid")
    shown = [results[name] for name in names if name in results and results[name].figures]
    if not shown:
        return
    sizes = ("AP small", "AP medium", "AP large")
    figure, axis = plt.subplots(figsize=(7, 3.6))
    width = 0.8 / len(shown)
    for index, result in enumerate(shown):
        heights = [_figure(result, {}, size) or 0.0 for size in sizes]
        label = f"{result.name}, {1000 * result.seconds_per_picture:.0f} ms"
        axis.bar([place + index * width for place in range(len(sizes))], heights, width, label=label)
    axis.set_ylim(bottom=0)
    axis.set_xticks([place + 0.4 - width / 2 for place in range(len(sizes))], sizes)
    axis.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    _save(figure, file)


def _save(figure: plt.Figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)
