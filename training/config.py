"""A training run's configuration: frozen values with help texts, command-line flags made from them, and conversion to
and from a checkpoint's dicts.

The flag of the same name overrides a value. An unknown key is an error, on the command line and in a checkpoint.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from model.metadata import MAX_DETECTIONS, NMS_THRESHOLD, SCORE_THRESHOLD, ResizePolicy
from model.retinanet import RetinaNetConfig

Normaliser = Literal["image", "batch", "running", "anchors"]
Precision = Literal["fp32", "bf16", "fp16", "fp64"]


@dataclass(frozen=True)
class LossConfig:
    """Matching and losses; the defaults are the paper's (Lin et al. 2017, §3, §4.1 and §5)."""

    fg_iou_threshold: Annotated[float, "least IoU of a foreground anchor"] = 0.5
    bg_iou_threshold: Annotated[float, "below this IoU an anchor is background; between the two it is ignored"] = 0.4
    border_anchors: Annotated[
        Literal["kept", "ignored"], "training's anchors that cross the picture's border; the RPN ignores them"
    ] = "kept"
    sampled_anchors: Annotated[int, "anchors of each picture that count, sampled in each step; 0: all"] = 0
    sampled_positives: Annotated[float, "largest share of positives among the sampled anchors"] = 0.5
    focal_alpha: Annotated[float, "weight of foreground; background has 1 - alpha; below 0: both have 1"] = 0.25
    focal_gamma: Annotated[float, "focusing exponent; 0 is plain cross-entropy"] = 2.0
    box_loss: Annotated[Literal["smooth_l1", "l1", "giou"], "loss of the boxes of positive anchors"] = "smooth_l1"
    smooth_l1_beta: Annotated[float, "difference from which smooth-L1 is linear: 1 / sigma**2 for sigma 3"] = 1 / 9
    box_loss_weight: Annotated[float, "factor on the box loss"] = 1.0
    normaliser: Annotated[
        Normaliser,
        "divisor of the losses: each image's positives, then the mean; the step's positives; their running mean; or "
        "all anchors that count",
    ] = "image"


@dataclass(frozen=True)
class OptimiserConfig:
    optimiser: Annotated[Literal["sgd", "adamw"], "update rule"] = "sgd"
    learning_rate: Annotated[float, "rate for reference_batch_size images a step; scaled with the batch size"] = 0.01
    reference_batch_size: Annotated[int, "images a step for which the learning rate is meant"] = 16
    momentum: Annotated[float, "momentum of SGD"] = 0.9
    weight_decay: Annotated[float, "decay of weights, without norms and biases"] = 1e-4
    warmup_steps: Annotated[int, "steps of linear warm-up"] = 1000
    schedule: Annotated[Literal["steps", "cosine"], "after warm-up: divide by 10 at each milestone, or cosine to 0"] = (
        "steps"
    )
    milestones: Annotated[tuple[float, ...], "fractions of all steps at which the rate drops"] = (60 / 90, 80 / 90)
    gradient_clip: Annotated[float, "largest norm of the gradient; 0: no limit"] = 0.0
    ema_decay: Annotated[float, "decay of the weights' exponential moving average; 0: no average"] = 0.0
    freeze_batch_norm_from: Annotated[
        float, "fraction of all steps from which batch norm uses its running statistics"
    ] = 1.0


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of a training sample. Lengths are canvas pixels, after the resize to the shorter side."""

    horizontal_flip: Annotated[float, "probability of a horizontal flip"] = 0.5
    vertical_flip: Annotated[float, "probability of a vertical flip"] = 0.0
    transpose: Annotated[float, "probability of swapping rows and columns"] = 0.0
    shorter_sides: Annotated[
        tuple[int, ...], "shorter sides, px, one of them for each sample; if not given, scaled with --shorter-side"
    ] = (800,)
    scale_jitter: Annotated[tuple[float, float], "range of a further factor on the scale, log-uniform"] = (1.0, 1.0)
    crop_sizes: Annotated[
        tuple[int, ...], "sides of square crops, px, one of them for each step; none: whole pictures"
    ] = ()
    crop_batch_sizes: Annotated[tuple[int, ...], "images a step for each crop size"] = ()
    crop_probabilities: Annotated[tuple[float, ...], "probability of each crop size"] = ()
    crop_on_object: Annotated[float, "probability that a crop is placed on a random object"] = 0.0
    min_visible: Annotated[float, "least share of an object's area in a crop; an object with less is ignored"] = 0.7
    brightness: Annotated[float, "largest relative change of brightness"] = 0.0
    contrast: Annotated[float, "largest relative change of contrast"] = 0.0
    shuffle_channels: Annotated[float, "probability of permuting red, green and blue"] = 0.0

    def __post_init__(self) -> None:
        if not len(self.crop_sizes) == len(self.crop_batch_sizes) == len(self.crop_probabilities):
            raise ValueError("crop_sizes, crop_batch_sizes and crop_probabilities need the same number of values")


@dataclass(frozen=True)
class DetectionConfig:
    """Defaults for making detections of candidates; an exported file carries them, and a request overrides them."""

    score_threshold: Annotated[float, "score that a detection must exceed"] = SCORE_THRESHOLD
    nms_threshold: Annotated[float, "largest IoU of two detections of one label"] = NMS_THRESHOLD
    max_detections: Annotated[int, "most detections of a picture"] = MAX_DETECTIONS


@dataclass(frozen=True)
class TrainConfig:
    model: RetinaNetConfig = field(default_factory=RetinaNetConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    resize: ResizePolicy = field(default_factory=ResizePolicy)
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    steps: Annotated[int, "updates of the weights"] = 90_000
    batch_size: Annotated[int, "images a step, all processes together"] = 16
    log_every: Annotated[int, "steps between lines in metrics.jsonl"] = 20
    checkpoint_every: Annotated[int, "steps between checkpoints"] = 1000
    evaluate_every: Annotated[int, "steps between evaluations; 0: only at the end"] = 5000
    evaluate_images: Annotated[int, "validation pictures for AP during training; 0: all"] = 0
    group_by_aspect: Annotated[bool, "give a step pictures that are all portrait or all landscape: less padding"] = (
        False
    )
    unreadable: Annotated[
        Literal["stop", "skip"], "end the run at a picture that cannot be read, or name it and take the next one"
    ] = "stop"
    precision: Annotated[
        Precision,
        "precision of the network: bf16 and fp16 by autocast, weights stay fp32; fp64 to compare runs exactly",
    ] = "fp32"
    channels_last: Annotated[
        bool | None, "memory layout of weights and images; unset: channels last on a GPU and a CPU with AVX-512"
    ] = None
    accumulate_steps: Annotated[int, "parts into which a process divides a step, to save memory"] = 1
    divergence_factor: Annotated[
        float, "factor by which the mean loss of 20 steps may exceed that of the first 20 before the run ends; 0: any"
    ] = 20.0
    freeze_stages: Annotated[int, "stages of the backbone that are frozen; 1: the stem, 2: up to C2"] = 0
    class_agnostic: Annotated[bool, "give every object the class 'object': the detector proposes regions"] = False
    seed: Annotated[int, "seed of weights and samples"] = 0
    pretrained_backbone: Annotated[bool, "start from torchvision's ImageNet weights (downloaded)"] = True


Config = TypeVar("Config")


def add_flags(parser: argparse.ArgumentParser, config_class: type[Any]) -> None:
    """Add a flag for every leaf field of the class and the classes in it; a flag that is not given is None."""
    for name, hint, help_text in _leaves(config_class):
        parser.add_argument(
            "--" + name.replace("_", "-"), dest=name, default=None, help=help_text or None, **_argument(hint)
        )


def override(config: Config, values: Mapping[str, Any]) -> Config:
    """Copy the config with those leaf fields replaced whose value is not None."""
    changes: dict[str, Any] = {}
    for entry in fields(config):  # type: ignore[arg-type]
        current = vars(config)[entry.name]
        if is_dataclass(current):
            changes[entry.name] = override(current, values)
        elif values.get(entry.name) is not None:
            changes[entry.name] = _frozen(values[entry.name])
    return replace(config, **changes)  # type: ignore[type-var]


def with_flags(config: TrainConfig, flags: Mapping[str, Any]) -> TrainConfig:
    """Override the config by the command line. Without --shorter-sides, those of training scale with --shorter-side.

    ValueError: a side is larger than the longest allowed.
    """
    changed = override(config, flags)
    if flags.get("shorter_sides") is None:
        ratio = changed.resize.shorter_side / config.resize.shorter_side
        sides = tuple(round(side * ratio) for side in config.augment.shorter_sides)
        changed = replace(changed, augment=replace(changed.augment, shorter_sides=sides))
    if max(changed.augment.shorter_sides, default=0) > changed.resize.longest_side:
        raise ValueError(
            f"training's shorter sides {changed.augment.shorter_sides} exceed the longest side "
            f"{changed.resize.longest_side}: give --shorter-sides or --longest-side"
        )
    return changed


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config to plain values, as a checkpoint holds them."""
    return dataclasses.asdict(config)


def from_dict(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """Make a config of `to_dict`'s values. ValueError: an unknown key."""
    hints = get_type_hints(config_class)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{config_class.__name__} has no {', '.join(unknown)}")
    return config_class(**{key: _restore(hints[key], value) for key, value in values.items()})


def _restore(hint: Any, value: Any) -> Any:
    if is_dataclass(hint):
        return from_dict(hint, value)  # type: ignore[arg-type]
    return _frozen(value)


def _frozen(value: Any) -> Any:
    """Turn a list into a tuple; JSON and argparse know lists alone."""
    return tuple(value) if isinstance(value, list) else value


def _leaves(config_class: type[Any]) -> list[tuple[str, Any, str]]:
    leaves: list[tuple[str, Any, str]] = []
    for name, hint in get_type_hints(config_class, include_extras=True).items():
        help_text = ""
        if get_origin(hint) is Annotated:
            hint, help_text = get_args(hint)
        if is_dataclass(hint):
            leaves += _leaves(hint)  # type: ignore[arg-type]
        else:
            leaves.append((name, hint, help_text))
    return leaves


def _argument(hint: Any) -> dict[str, Any]:
    """Give argparse's arguments for a type: a Literal's choices, a tuple's number of values, --x and --no-x for a bool.

    A tuple of any length may be empty: `--crop-sizes` alone trains on whole pictures.
    """
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:
        kind, *others = get_args(hint)
        return {"type": kind, "nargs": "*" if others == [...] else 1 + len(others), "metavar": "X"}
    if hint in (bool, bool | None):
        return {"action": argparse.BooleanOptionalAction}
    return {"type": hint, "metavar": "X"}
