"""The page of the ablations: whether they confirm each claim of the article, in its order, with plots.

Writes ablations.md and figures/*.png into a folder, and OUT/log.md, a table for the log of runs. Every figure comes
from OUT/results.jsonl, the ablations' run folders, or the loss itself. An ablation without a result is "not run".
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from training.ablations.claims import PARTS, Part, chance_of, figure_of, format_figure, verdict
from training.ablations.plots import plot_prior, plot_pyramids, plot_shares
from training.ablations.runs import ABLATIONS, Result, read_losses, read_results
from training.coco import CocoDataSet
from training.loss.losses import focal_loss_sum
from training.presets import ABLATION

SCENARIOS = (("easy, right", 0.9), ("wrong", 0.1), ("very easy, right", 0.99))
"""The article's scenarios, each with the probability that the detector gives to the true class."""


def write_page(out: Path, page: Path, validation_set: CocoDataSet) -> None:
    """Write ablations.md and its plots into the folder `page`, and OUT/log.md."""
    results = {result.name: result for result in read_results(out)}
    losses = {ablation.name: dict(read_losses(out, ablation.name)) for ablation in ABLATIONS}
    plots = page / "figures"
    plots.mkdir(parents=True, exist_ok=True)
    shares = ""
    if (out / "baseline" / "best.pt").exists():
        shares = plot_shares(out / "baseline" / "best.pt", validation_set, plots / "shares.png")
    plot_prior(losses, plots / "prior.png")
    plot_pyramids(results, plots / "pyramids.png")
    sections = [_introduction(results)]
    for number, part in enumerate(PARTS, start=1):
        sections.append(_section(number, part, results, losses, plots))
        if part.plot == "shares.png":
            sections += [scenario_table(), shares]
    (page / "ablations.md").write_text("\n\n".join(section for section in sections if section) + "\n")
    (out / "log.md").write_text(log_table(results) + "\n")


def scenario_table() -> str:
    """Make the table of the article's three scenarios, computed by the loss that trains."""
    lines = [
        "The article's three scenarios, computed by the loss that trains (α 0.25, γ 2). p is the probability given to "
        "the truth. Background has the weight 1 - α, which the article forgets.",
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
    """Compute the loss of one anchor to which the detector gives this probability of foreground."""
    logit = torch.logit(torch.tensor([[probability]], dtype=torch.float64))
    positive = torch.zeros(int(foreground), dtype=torch.int64)
    return focal_loss_sum(logit, (positive, positive), torch.tensor([False]), alpha=alpha, gamma=gamma).item()


def log_table(results: Mapping[str, Result]) -> str:
    lines = ["| ablation | steps | AP | AP50 | minutes | machine | commit |", "|---|---|---|---|---|---|---|"]
    for result in results.values():
        ap, ap50 = (figure_of(result, {}, name) for name in ("AP", "AP50"))
        lines.append(
            f"| {result.name} | {result.steps} | {format_figure(ap)} | {format_figure(ap50)} | {result.minutes:.1f} | "
            f"{result.machine} | {result.commit} |"
        )
    return "\n".join(lines)


def _introduction(results: Mapping[str, Result]) -> str:
    baseline = results.get("baseline")
    steps = ABLATION.steps if baseline is None else baseline.steps
    pictures = "" if baseline is None else f"{baseline.num_pictures} "
    return f"""# Ablations: the article's claims, on data

This page checks the claims of the article *The intuition behind RetinaNet*, in its order, by small training runs that
differ in one value each. `make ablations` runs them and writes the page; when stopped, it continues where it was.
{_status(results)}

- **Model**: {ABLATION.model.describe()}.
- **Training**: {steps} steps (unless a row says otherwise) of {ABLATION.batch_size} crops of
  {ABLATION.augment.crop_sizes[0]} px, from scratch, on the demo data set (`python -m training demo`) with a shorter
  side of {ABLATION.resize.shorter_side} px. All objects have **one class**: a detector first learns whether there is
  an object, and these runs are short.
- **AP** is COCO's on the {pictures}validation pictures, of one seed.
- **Significance**: a difference counts if it is larger than what another seed changes: {_chance_sentence(results)}
- **Milliseconds per picture** are the median time from pixels to detections."""


def _status(results: Mapping[str, Result]) -> str:
    """Say how many ablations were run, where, and at which commit."""
    if not results:
        return f"**None of the {len(ABLATIONS)} ablations has been run.**"
    missing = [ablation.name for ablation in ABLATIONS if ablation.name not in results]
    machines = sorted({result.machine for result in results.values()})
    commits = sorted({result.commit for result in results.values()})
    minutes = sum(result.minutes for result in results.values())
    run = f"{len(results)} of {len(ABLATIONS)} ablations were run, in {minutes:.0f} minutes, on {'; '.join(machines)}"
    not_run = f" **Not run: {', '.join(missing)}.**" if missing else ""
    return f"{run}, at commit {', '.join(commits)}.{not_run}"


def _chance_sentence(results: Mapping[str, Result]) -> str:
    chance = chance_of(results, "AP")
    return "not run." if chance is None else f"{format_figure(chance)} AP between `baseline` and `baseline-again`."


def _section(
    number: int, part: Part, results: Mapping[str, Result], losses: Mapping[str, Mapping[int, float]], plots: Path
) -> str:
    lines = [f"## {number}. {part.title}", "", part.text, ""]
    lines.append(f"| ablation | change | {' | '.join(part.figures)} | ms per picture |")
    lines.append("|---" * (len(part.figures) + 3) + "|")
    changes = {ablation.name: ablation.change for ablation in ABLATIONS}
    for name in part.ablations:
        result = results.get(name)
        if result is None:
            cells = ["not run", *[""] * len(part.figures)]
        elif result.failure:
            cells = [f"diverged: {result.failure}", *[""] * len(part.figures)]
        else:
            cells = [format_figure(figure_of(result, {}, figure)) for figure in (*part.figures, "ms per picture")]
        lines.append(f"| `{name}` | {changes[name]} | {' | '.join(cells)} |")
    lines.append("")
    lines += [f"- {claim.text}: {verdict(claim, results, losses)}" for claim in part.claims]
    if part.plot and (plots / part.plot).exists():
        lines += ["", f"![{part.title}](figures/{part.plot})"]
    return "\n".join(lines)
