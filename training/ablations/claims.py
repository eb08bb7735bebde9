"""The article's claims: which ablation's figure is above which other's, and whether the results confirm it.

A difference confirms a claim if it is larger than what another seed alone changes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from training.ablations.runs import FIGURES, Result

GAMMAS_CAVEAT = (
    "In the paper γ 0.5 to 2 differ by 1.1 AP after 90,000 steps; a few hundred may favour the larger gradients."
)
BOUNDED_STEPS = "AdamW and clipping bound each step for any loss."
ONE_CLASS = "Here everything is one class, and a picture has about 12,000 anchors, not 100,000 in 80 classes."


@dataclass(frozen=True)
class Claim:
    """A claim that one ablation's figure is above another's."""

    text: str
    better: str
    worse: str
    figure: str
    caveat: str = ""
    """A reason why this data may not confirm it."""


@dataclass(frozen=True)
class Part:
    title: str
    text: str
    ablations: tuple[str, ...]
    claims: tuple[Claim, ...]
    figures: tuple[str, ...] = ("AP", "AP50", "AP small", "AP medium", "AP large")
    plot: str = ""


PARTS = (
    Part(
        "Proposals: the RPN on a pyramid and on a single feature map",
        "The region proposal network is the same code with other values: one class, one anchor size for each level, a "
        "head of one shared 3×3 convolution, labels by IoU 0.7 and 0.3 and the best anchor, 256 sampled anchors, none "
        "across the border. Its figure is average recall: the share of objects that 100 or 1,000 proposals find, over "
        "IoU 0.50 to 0.95.",
        ("rpn", "rpn-top"),
        (
            Claim(
                "A pyramid finds small objects that a single subsampled map cannot find", "rpn", "rpn-top",
                "AR@1000 small",
            ),
            Claim("The pyramid's proposals are better for all sizes together", "rpn", "rpn-top", "AR@1000"),
        ),
        ("AR@100", "AR@1000", "AR@1000 small", "AR@1000 medium", "AR@1000 large"),
    ),
    Part(
        "Feature pyramids and image pyramids",
        "The heads look at P3 to P7 (the baseline), at the same levels without the top-down path (`rough`), or at P5 "
        "alone with the anchors of all levels (`top`). The image pyramid runs a trained model on several sizes of a "
        "picture and merges the detections by one NMS.",
        ("baseline", "top", "rough", "image-pyramid", "top-image-pyramid"),
        (
            Claim("The feature pyramid beats the top level alone", "baseline", "top", "AP"),
            Claim("The feature pyramid beats the top level alone for small objects", "baseline", "top", "AP small"),
            Claim(
                "The top-down path brings semantics to the high-resolution levels", "baseline", "rough", "AP small",
                "Edges and texture, which low levels see, tell the shapes from their background: the semantic gap of "
                "the article is small here.",
            ),
            Claim("An image pyramid helps a single feature map", "top-image-pyramid", "top", "AP"),
            Claim("An image pyramid is costly", "image-pyramid", "baseline", "ms per picture"),
        ),
        plot="pyramids.png",
    ),
    Part(
        "Focal loss",
        "Only the classification loss differs. Plain cross-entropy gives every anchor the weight 1. Each γ has the α "
        "that was best with it in the paper (its table 1b): 0.75 for γ 0, 0.5 for γ 0.5, 0.25 above.",
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
        "Without the prior, every anchor starts at probability 0.5. The preset has AdamW, clipped gradients, warm-up "
        "and batch norm in the heads, which all mitigate a bad start. The ablations called `sgd` have the paper's bare "
        "SGD, without warm-up, for 100 steps.",
        (
            "baseline", "no-prior", "cross-entropy", "cross-entropy-no-prior", "sgd", "sgd-no-prior",
            "sgd-cross-entropy-no-prior",
        ),
        (
            Claim("Without the prior the first loss is far larger", "no-prior", "baseline", "first loss"),
            Claim(
                "The same with plain cross-entropy", "cross-entropy-no-prior", "cross-entropy", "first loss"
            ),
            Claim("Without the prior AP is lower", "baseline", "no-prior", "AP", BOUNDED_STEPS),
            Claim(
                "The same with plain cross-entropy", "cross-entropy", "cross-entropy-no-prior", "AP", BOUNDED_STEPS
            ),
            Claim(
                "With cross-entropy and bare SGD it diverges without the prior", "sgd", "sgd-cross-entropy-no-prior",
                "AP",
            ),
        ),
        plot="prior.png",
    ),
    Part(
        "The box regression subnet: smooth-L1 with σ 3",
        "Only the box loss differs. Its weight is 1 each time, although GIoU has another scale.",
        ("baseline", "l1", "giou"),
        (
            Claim("Smooth-L1 with σ 3 is as good as L1 or better", "baseline", "l1", "AP"),
            Claim("GIoU, which came after the article, is better at high IoU", "giou", "baseline", "AP75"),
        ),
        ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large"),
    ),
)  # fmt: skip


def verdict(claim: Claim, results: Mapping[str, Result], losses: Mapping[str, Mapping[int, float]]) -> str:
    """Say that it is confirmed, not confirmed (with the caveat), not significant, or not run."""
    better, worse = results.get(claim.better), results.get(claim.worse)
    if better is None or worse is None:
        missing = [name for name in (claim.better, claim.worse) if name not in results]
        return f"not run: {', '.join(missing)}"
    if claim.figure.startswith(("AP", "AR")) and (better.failure or worse.failure):
        failed = " and ".join(result.name for result in (better, worse) if result.failure)
        confirmed = worse.failure and not better.failure
        return f"**{'confirmed' if confirmed else 'not confirmed'}**: {failed} diverged"
    one, other = (figure_of(result, losses.get(result.name, {}), claim.figure) for result in (better, worse))
    if one is None or other is None:
        return f"cannot be decided: there is no {claim.figure}"
    chance = chance_of(results, claim.figure)
    compared = f"{claim.figure} {format_figure(one)} against {format_figure(other)}"
    if one - other > (chance or 0):
        return f"**confirmed**: {compared}" + ("" if chance is not None else ", one seed each")
    if chance is not None and abs(one - other) <= chance:
        return f"not significant (another seed changes {format_figure(chance)}): {compared}. {claim.caveat}".strip()
    return f"**not confirmed**: {compared}. {claim.caveat}".strip()


def chance_of(results: Mapping[str, Result], figure: str) -> float | None:
    """The change of a baseline's figure by another seed; None if it is not known or does not depend on the seed."""
    pair = [results.get(name) for name in ("baseline", "baseline-again")]
    figures = [figure_of(result, {}, figure) for result in pair if result is not None]
    known = [value for value in figures if value is not None]
    return abs(known[0] - known[1]) if len(known) == 2 and figure in FIGURES else None


def figure_of(result: Result, losses: Mapping[int, float], name: str) -> float | None:
    if name == "first loss":
        return losses.get(1)
    if name == "ms per picture":
        return 1000 * result.seconds_per_picture if result.figures else None
    value = result.figures.get(name)
    return None if value is None or math.isnan(value) else value  # NaN: the data set has no such objects


def format_figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.0f}"
