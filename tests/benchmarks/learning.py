"""Our RetinaNet against torchvision's: AP after the same steps, and steps a second.

    python -m tests.benchmarks.learning --data DIR [--init CHECKPOINT.pt] [--steps 600] [--seeds 2] [--shorter-side 320]
        [--precision bf16] [--threads N]

Both sides start from the same weights, see the same crops and share update rule and schedule; they take turns, step
by step. What differs is all that lies between a batch and its gradients (network, anchors, matching, losses), and
between a picture and its detections. The network is torchvision's v2 on a ResNet-18: batch norm that is trained, group
norm in the heads, GIoU. With `--init` both take over the backbone and the pyramid of that checkpoint, and their width;
the heads are fresh. Prints a markdown table for docs/training-log.md.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNet as TheirRetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from tqdm import tqdm

from model.backbones import build_backbone
from model.candidates import CandidateDetector
from model.detector import available_cores
from model.metadata import Label, ResizePolicy
from model.retinanet import RetinaNet, RetinaNetConfig
from model.types import Detections, Pixels
from tests.benchmarks.measuring import command, machine, table
from training.checkpoint import load_checkpoint
from training.coco import CocoDataSet, load_coco
from training.config import AugmentConfig, TrainConfig
from training.data import load_batches
from training.evaluate import evaluate, torch_predictor
from training.evaluation.average_precision import ApReport
from training.loss.losses import retinanet_losses
from training.optimiser import build_optimiser, learning_rate
from training.presets import PRESETS
from training.train import AUTOCAST, TrainingForward
from training.transforms import Batch

CANDIDATES = 1000
"""Candidates of each level, as in our files."""


Losses = Callable[[Batch], Tensor]
"""A batch to the sum of its losses."""


@dataclass
class Side:
    """One of the two, with what it learns by."""

    network: nn.Module
    losses: Losses
    config: TrainConfig
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimiser = build_optimiser(self.network, self.config.optimiser)

    def learn(self, batch: Batch, step: int) -> float:
        """Take a step, and return its loss."""
        started = time.perf_counter()
        rate = learning_rate(self.config.optimiser, step, steps=self.config.steps, batch_size=self.config.batch_size)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.network.train()
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.losses(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.optimiser.gradient_clip)
        self.optimiser.step()
        self.seconds.append(time.perf_counter() - started)
        return loss.item()


def our_losses(network: RetinaNet, config: TrainConfig) -> Losses:
    predict = TrainingForward(network, config.precision, config.channels_last)

    def losses(batch: Batch) -> Tensor:
        predictions = predict(batch.images, batch.sizes)
        return retinanet_losses(predictions, network.anchors_of(batch.canvas), batch.targets, config.loss).total

    return losses


def their_losses(network: TheirRetinaNet, config: TrainConfig) -> Losses:
    """The arithmetic of torchvision's references/detection/engine.py."""
    dtype = AUTOCAST.get(config.precision)

    def losses(batch: Batch) -> Tensor:
        images = list(batch.images.permute(0, 3, 1, 2).float() / 255)
        targets = [{"boxes": target.boxes, "labels": target.columns} for target in batch.targets]
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            total: Tensor = sum(network(images, targets).values())
        return total

    return losses


def their_network(config: TrainConfig, num_classes: int) -> TheirRetinaNet:
    """torchvision's RetinaNet of our config's sizes."""
    model, detection = config.model, config.detection
    backbone = build_backbone(model.backbone, width=model.backbone_width)
    stages = {"layer2": "0", "layer3": "1", "layer4": "2"}
    above = LastLevelP6P7(backbone.channels[-1], model.fpn_channels)
    pyramid = BackboneWithFPN(backbone.body, stages, list(backbone.channels), model.fpn_channels, above)
    groups = min(32, model.head_channels // 8)
    network = TheirRetinaNet(
        pyramid,
        num_classes,
        min_size=config.resize.shorter_side,
        max_size=config.resize.longest_side,
        head=RetinaNetHead(model.fpn_channels, 9, num_classes, norm_layer=partial(nn.GroupNorm, groups)),
        score_thresh=detection.score_threshold,
        nms_thresh=detection.nms_threshold,
        detections_per_img=detection.max_detections,
        topk_candidates=CANDIDATES,
    )
    network.head.regression_head._loss_type = "giou"
    return network


@dataclass(frozen=True)
class TheirPredictor:
    """torchvision's way from a picture to detections, in the form that `evaluate` takes."""

    network: TheirRetinaNet
    labels: tuple[Label, ...]

    @torch.inference_mode()
    def __call__(self, pixels: Pixels) -> Detections:
        [found] = self.network.eval()([torch.from_numpy(pixels).permute(2, 0, 1).float() / 255])
        ids = torch.tensor([label.class_id for label in self.labels])[found["labels"]]
        return Detections(found["boxes"].numpy(), found["scores"].numpy(), ids.numpy())


def two_sides(config: TrainConfig, init: Path | None, num_classes: int) -> tuple[Side, Side]:
    torch.manual_seed(config.seed)
    ours = RetinaNet(config.model, num_classes)
    if init is not None:
        known = load_checkpoint(init).best_weights
        ours.load_state_dict(
            {name: known[name] for name in ours.state_dict() if name.startswith("backbone.")}, strict=False
        )
    theirs = their_network(config, num_classes)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.to(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)  # type: ignore[call-overload]
    return Side(ours, our_losses(ours, config), config), Side(theirs, their_losses(theirs, config), config)


def learn_in_turns(config: TrainConfig, training_set: CocoDataSet, sides: tuple[Side, Side]) -> None:
    batches = load_batches(training_set, config, first_step=0, workers=0)
    for step, batch in enumerate(tqdm(batches, total=config.steps, unit="step")):
        for side in sides if step % 2 else sides[::-1]:
            side.learn(batch, step)


def average_precisions(config: TrainConfig, sides: tuple[Side, Side], validation_set: CocoDataSet) -> list[ApReport]:
    ours, theirs = (side.network.eval() for side in sides)
    labels = validation_set.labels
    assert isinstance(ours, RetinaNet) and isinstance(theirs, TheirRetinaNet)
    predictor = torch_predictor(CandidateDetector(ours, labels), labels, config.resize, config.detection)
    return [evaluate(each, validation_set) for each in (predictor, TheirPredictor(theirs, labels))]


def config_of(options: argparse.Namespace, seed: int) -> TrainConfig:
    """torchvision's second recipe on a ResNet-18, with a schedule for so few steps, and crops of one size."""
    preset, side = PRESETS["torchvision-v2"], options.shorter_side
    model = replace(preset.model, backbone="resnet18")
    if options.init is not None:
        known: RetinaNetConfig = load_checkpoint(options.init).config.model
        model = replace(
            model,
            backbone=known.backbone,
            backbone_width=known.backbone_width,
            fpn_channels=known.fpn_channels,
            head_channels=known.fpn_channels,
        )
    small = PRESETS["small"]
    return replace(
        preset,
        model=model,
        optimiser=replace(small.optimiser, ema_decay=0.0, freeze_batch_norm_from=1.0),
        augment=AugmentConfig(
            vertical_flip=0.5,
            transpose=0.5,
            shorter_sides=(side,),
            scale_jitter=(1.0, 1.3),
            crop_sizes=(side,),
            crop_batch_sizes=(options.batch_size,),
            crop_probabilities=(1.0,),
            min_visible=1e-6,
        ),
        resize=ResizePolicy(shorter_side=side, longest_side=side * 5 // 3),
        steps=options.steps,
        batch_size=options.batch_size,
        group_by_aspect=False,
        freeze_stages=0,
        precision=options.precision,
        channels_last=torch.backends.cpu.get_cpu_capability() == "AVX512",
        seed=seed,
        pretrained_backbone=False,
    )


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a COCO-format data set")
    parser.add_argument("--init", type=Path, help="checkpoint whose backbone and pyramid both sides start with")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--shorter-side", type=int, default=320)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of both, by autocast")
    parser.add_argument("--threads", type=int, default=available_cores())
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    training_set, validation_set = (load_coco(options.data, split) for split in ("train", "val"))
    rows = []
    for seed in range(options.seeds):
        config = config_of(options, seed)
        sides = two_sides(config, options.init, len(training_set.labels))
        learn_in_turns(config, training_set, sides)
        reports = average_precisions(config, sides, validation_set)
        for name, side, report in zip(("ours", "torchvision's"), sides, reports, strict=True):
            speed = 1 / statistics.median(side.seconds)
            rows.append((seed, name, f"{report.ap:.3f}", f"{report.ap50:.3f}", f"{report.ap75:.3f}", f"{speed:.2f}"))
            print(*rows[-1], file=sys.stderr)  # a run that is ended keeps what it has
    print(f"{machine()}, torch {torch.__version__}, torchvision {torchvision.__version__}, {options.threads} threads; ")
    print(f"{config.model.describe()}; {command('tests.benchmarks.learning')}\n")
    print(table(("seed", "RetinaNet", "AP", "AP50", "AP75", "steps a second"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
