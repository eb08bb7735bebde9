"""What a training run is made of: frozen values with their help texts, the presets, and the command-line flags made
from them.

A preset is the sole home of its numbers; every value of it can be overridden by the flag of the same name. An
unknown key is an error, on the command line and in a checkpoint.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from model.anchors import AnchorConfig
from model.metadata import MAX_DETECTIONS, NMS_THRESHOLD, SCORE_THRESHOLD, ResizePolicy
from model.retinanet import RetinaNetConfig


@dataclass(frozen=True)
class LossConfig:
    """Matching and losses; the defaults are the paper's (Lin et al. 2017, §3, §4.1 and §5)."""

    fg_iou_threshold: Annotated[float, "an anchor is an object's from this IoU on"] = 0.5
    bg_iou_threshold: Annotated[float, "below this IoU an anchor is background; between the two it is ignored"] = 0.4
    border_anchors: Annotated[
        Literal["kept", "ignored"], "in training, anchors that cross the picture's border; the RPN ignores them"
    ] = "kept"
    sampled_anchors: Annotated[int, "anchors of each picture that count, drawn in each step; 0: all"] = 0
    sampled_positives: Annotated[float, "largest share of positives among the sampled anchors"] = 0.5
    focal_alpha: Annotated[float, "weight of foreground; background has 1 - alpha; below 0: both have 1"] = 0.25
    focal_gamma: Annotated[float, "focusing exponent; 0 is plain cross-entropy"] = 2.0
    box_loss: Annotated[Literal["smooth_l1", "l1", "giou"], "loss of the boxes of positive anchors"] = "smooth_l1"
    smooth_l1_beta: Annotated[float, "where smooth-L1 turns linear: 1 / sigma**2 for sigma 3"] = 1 / 9
    box_loss_weight: Annotated[float, "factor on the box loss"] = 1.0
    normaliser: Annotated[
        Literal["image", "batch", "running", "anchors"],
        "divide by each image's positives, then average; by the positives of the whole step; by their running mean; or "
        "by all anchors that count",
    ] = "image"


@dataclass(frozen=True)
class OptimiserConfig:
    optimiser: Annotated[Literal["sgd", "adamw"], "update rule"] = "sgd"
    learning_rate: Annotated[float, "at reference_batch_size images a step; scaled linearly with the batch size"] = 0.01
    reference_batch_size: Annotated[int, "images a step that the learning rate is meant for"] = 16
    momentum: Annotated[float, "of SGD"] = 0.9
    weight_decay: Annotated[float, "of weights; not of norms and biases"] = 1e-4
    warmup_steps: Annotated[int, "steps of linear warm-up"] = 1000
    schedule: Annotated[Literal["steps", "cosine"], "after warm-up: divide by 10 at each milestone, or cosine to 0"] = (
        "steps"
    )
    milestones: Annotated[tuple[float, ...], "fractions of all steps"] = (60 / 90, 80 / 90)
    gradient_clip: Annotated[float, "largest norm of the gradient; 0 does not clip"] = 0.0
    ema_decay: Annotated[float, "of the exponential moving average of the weights; 0 keeps none"] = 0.0
    freeze_batch_norm_from: Annotated[
        float, "fraction of all steps from which batch norm uses its running statistics"
    ] = 1.0


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of a training sample. Lengths are canvas pixels, after the resize to the shorter side."""

    horizontal_flip: Annotated[float, "probability"] = 0.5
    vertical_flip: Annotated[float, "probability"] = 0.0
    transpose: Annotated[float, "probability of swapping rows and columns"] = 0.0
    shorter_sides: Annotated[tuple[int, ...], "px; one is drawn for each sample"] = (800,)
    scale_jitter: Annotated[tuple[float, float], "range of a further factor on the scale, log-uniform"] = (1.0, 1.0)
    crop_sizes: Annotated[
        tuple[int, ...], "px; sides of square crops, one drawn for each step; none: whole pictures"
    ] = ()
    crop_batch_sizes: Annotated[tuple[int, ...], "images a step for each crop size"] = ()
    crop_probabilities: Annotated[tuple[float, ...], "of each crop size"] = ()
    crop_on_object: Annotated[float, "probability that a crop is laid so that it holds a drawn object"] = 0.0
    min_visible: Annotated[float, "an object of which a crop leaves less than this share of its area is ignored"] = 0.7
    brightness: Annotated[float, "largest relative change"] = 0.0
    contrast: Annotated[float, "largest relative change"] = 0.0
    shuffle_channels: Annotated[float, "probability of permuting red, green and blue"] = 0.0

    def __post_init__(self) -> None:
        if not len(self.crop_sizes) == len(self.crop_batch_sizes) == len(self.crop_probabilities):
            raise ValueError("crop_sizes, crop_batch_sizes and crop_probabilities need the same number of values")


@dataclass(frozen=True)
class DetectionConfig:
    """What is made of the candidates, unless a request says otherwise; an exported file carries it."""

    score_threshold: Annotated[float, "a detection scores more than this"] = SCORE_THRESHOLD
    nms_threshold: Annotated[float, "largest IoU of two detections of one label"] = NMS_THRESHOLD
    max_detections: Annotated[int, "of a picture"] = MAX_DETECTIONS


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
    checkpoint_every: Annotated[int, "steps"] = 1000
    evaluate_every: Annotated[int, "steps; 0: only at the end"] = 5000
    evaluate_images: Annotated[int, "validation pictures for AP while training; 0: all"] = 0
    group_by_aspect: Annotated[bool, "a step's pictures are all upright or all lying, so that less is padded"] = False
    unreadable: Annotated[
        Literal["stop", "skip"], "a picture that cannot be read ends the run, or is named and the next one stands in"
    ] = "stop"
    precision: Annotated[
        Literal["fp32", "bf16", "fp16", "fp64"],
        "of the network's arithmetic: bf16 and fp16 by autocast, weights stay fp32; fp64 to compare runs exactly",
    ] = "fp32"
    channels_last: Annotated[
        bool | None, "weights and images lie in memory as GPUs want them; unset: on a GPU and on a CPU with AVX-512"
    ] = None
    accumulate_steps: Annotated[int, "parts that a process computes its images of a step in, to save memory"] = 1
    divergence_factor: Annotated[
        float, "the run ends when the mean loss of 20 steps is this many times that of its first 20; 0: never"
    ] = 20.0
    freeze_stages: Annotated[int, "stages of the backbone that stay as they are; 1: the stem, 2: up to C2"] = 0
    class_agnostic: Annotated[bool, "every object is of one class, 'object': the detector proposes regions"] = False
    seed: Annotated[int, "of weights and samples"] = 0
    pretrained_backbone: Annotated[bool, "start from torchvision's ImageNet weights (downloaded)"] = True


PROPOSAL_LOSS = LossConfig(
    fg_iou_threshold=0.7,
    bg_iou_threshold=0.3,
    border_anchors="ignored",
    sampled_anchors=256,
    focal_alpha=-1.0,
    focal_gamma=0.0,
    normaliser="anchors",
)
"""The region proposal network's: cross-entropy on 256 drawn anchors (Ren et al. 2015 §3.1.2, §3.1.3)."""
PROPOSALS = DetectionConfig(score_threshold=0.0, nms_threshold=0.7, max_detections=1000)

PRESETS: dict[str, TrainConfig] = {
    # Lin et al. 2017, §4.1 and §5: ResNet-50, 16 images a step, 90k steps
    "paper": TrainConfig(),
    # torchvision's reference recipe: 26 epochs of COCO, milestones after 16 and 22, plain L1. It decays biases too.
    "torchvision-v1": TrainConfig(
        model=RetinaNetConfig(p6_from="p5", anchors=AnchorConfig(stride="torchvision")),
        loss=LossConfig(box_loss="l1"),
        optimiser=OptimiserConfig(milestones=(16 / 26, 22 / 26)),
        steps=190_000,
        group_by_aspect=True,
        freeze_stages=2,
    ),
    # its second one: AdamW, batch norm that is trained, GroupNorm in the heads, GIoU, shorter sides 480 to 800
    "torchvision-v2": TrainConfig(
        model=RetinaNetConfig(backbone_norm="batch", head_norm="group", anchors=AnchorConfig(stride="torchvision")),
        loss=LossConfig(box_loss="giou"),
        optimiser=OptimiserConfig(
            optimiser="adamw", learning_rate=1e-4, weight_decay=0.05, milestones=(16 / 26, 22 / 26)
        ),
        augment=AugmentConfig(shorter_sides=tuple(range(480, 801, 32))),
        steps=190_000,
        group_by_aspect=True,
        freeze_stages=2,
    ),
    # detectron2's RetinaNet R50 3x, on torchvision's backbone weights: shorter sides 640 to 800, smooth-L1 with beta 0,
    # losses over the running mean of the positives
    "detectron2-3x": TrainConfig(
        loss=LossConfig(box_loss="l1", normaliser="running"),
        optimiser=OptimiserConfig(milestones=(210 / 270, 250 / 270)),
        augment=AugmentConfig(shorter_sides=tuple(range(640, 801, 32))),
        steps=270_000,
        group_by_aspect=True,
        freeze_stages=2,
    ),
    # Lin et al. 2017, Feature Pyramid Networks, §5.1: proposals, 16 images a step, 40k steps
    "rpn": TrainConfig(
        model=RetinaNetConfig(
            p6_from="pool", head="shared", head_convs=1, anchors=AnchorConfig(scales=(1.0,), lowest_level=2)
        ),
        loss=PROPOSAL_LOSS,
        optimiser=OptimiserConfig(learning_rate=0.02, milestones=(30 / 40,)),
        detection=PROPOSALS,
        steps=40_000,
        class_agnostic=True,
    ),
    # small enough to be trained from scratch on two cores, on crops at the scale that is served
    "demo": TrainConfig(
        model=RetinaNetConfig(
            backbone="resnet18",
            backbone_width=0.375,
            backbone_norm="batch",
            fpn_channels=64,
            head_channels=64,
            head_convs=2,
            head_norm="batch",
            anchors=AnchorConfig(base_sizes=(20, 40, 80, 160, 320)),
        ),
        loss=LossConfig(box_loss="giou", normaliser="batch"),
        optimiser=OptimiserConfig(
            optimiser="adamw",
            learning_rate=1.5e-3,
            reference_batch_size=8,
            weight_decay=0.03,
            warmup_steps=200,
            schedule="cosine",
            gradient_clip=10.0,
            ema_decay=0.9985,
            freeze_batch_norm_from=0.75,
        ),
        augment=AugmentConfig(
            vertical_flip=0.5,
            transpose=0.5,
            scale_jitter=(0.6, 1.3),
            crop_sizes=(384, 544, 672),
            crop_batch_sizes=(6, 3, 2),
            crop_probabilities=(0.3, 0.3, 0.4),
            crop_on_object=0.7,
            shuffle_channels=0.5,
        ),
        steps=8000,
        batch_size=8,
        checkpoint_every=100,
        evaluate_every=1500,
        evaluate_images=60,
        pretrained_backbone=False,
    ),
    # a few minutes on two cores, what `python -m training article` compares: to find objects is learned before classes
    "article": TrainConfig(
        model=RetinaNetConfig(
            backbone="resnet18",
            backbone_width=0.25,
            backbone_norm="batch",
            fpn_channels=32,
            head_channels=32,
            head_convs=2,
            head_norm="batch",
            anchors=AnchorConfig(base_sizes=(8, 16, 32, 64, 128)),
        ),
        loss=LossConfig(normaliser="batch"),
        optimiser=OptimiserConfig(
            optimiser="adamw",
            learning_rate=3e-3,
            reference_batch_size=8,
            weight_decay=0.03,
            warmup_steps=50,
            schedule="cosine",
            gradient_clip=10.0,
            ema_decay=0.98,
            freeze_batch_norm_from=0.75,
        ),
        augment=AugmentConfig(
            vertical_flip=0.5,
            shorter_sides=(256,),
            crop_sizes=(256,),
            crop_batch_sizes=(8,),
            crop_probabilities=(1.0,),
            crop_on_object=0.5,
        ),
        resize=ResizePolicy(shorter_side=256, longest_side=427),
        steps=500,
        batch_size=8,
        log_every=1,
        checkpoint_every=100,
        evaluate_every=0,
        class_agnostic=True,
        pretrained_backbone=False,
    ),
}

Config = TypeVar("Config")


def add_flags(parser: argparse.ArgumentParser, config_class: type[Any]) -> None:
    """A flag for every leaf field of the class and the classes in it; not given means None."""
    for name, hint, help_text in _leaves(config_class):
        parser.add_argument(
            "--" + name.replace("_", "-"), dest=name, default=None, help=help_text or None, **_argument(hint)
        )


def override(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy of the config with those leaf fields replaced whose value is not None."""
    changes: dict[str, Any] = {}
    for entry in fields(config):  # type: ignore[arg-type]
        current = vars(config)[entry.name]
        if is_dataclass(current):
            changes[entry.name] = override(current, values)
        elif values.get(entry.name) is not None:
            changes[entry.name] = values[entry.name]
    return replace(config, **changes)  # type: ignore[type-var]


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values only, as a checkpoint holds them."""
    return dataclasses.asdict(config)


def from_dict(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """The inverse of `to_dict`. ValueError: an unknown key."""
    hints = get_type_hints(config_class)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{config_class.__name__} has no {', '.join(unknown)}")
    return config_class(**{key: _restore(hints[key], value) for key, value in values.items()})


def _restore(hint: Any, value: Any) -> Any:
    if is_dataclass(hint):
        return from_dict(hint, value)  # type: ignore[arg-type]
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
    """argparse's arguments for a type: a Literal's choices, several values for a tuple, --x and --no-x for a bool."""
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:
        return {"type": get_args(hint)[0], "nargs": "+", "metavar": "X", "action": _Tuple}
    if hint in (bool, bool | None):
        return {"action": argparse.BooleanOptionalAction}
    return {"type": hint, "metavar": "X"}


class _Tuple(argparse.Action):
    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        vars(namespace)[self.dest] = tuple(values)
