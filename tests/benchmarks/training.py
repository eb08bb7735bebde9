"""Our training against torchvision's reference loop: steps a second, data loading, memory.

    python -m tests.benchmarks.training [--backbone resnet50] [--shorter-side 800] [--batch-size 2] [--rounds N]
        [--channels-last] [--precision bf16]

Both sides train the same network (torchvision's v1: frozen batch norm, the last three stages of the backbone, plain
L1) from the same weights, on the same pictures in the same order, with as many loading processes and threads;
they take turns. Theirs is torchvision's model with its GeneralizedRCNNTransform inside, and the arithmetic of one step
of its references/detection/engine.py. Prints a markdown table for docs/benchmarks.md. Nothing
else should run meanwhile.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.retinanet import RetinaNet as TheirRetinaNet
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms.v2 import functional as F

from model.backbones import RESNETS
from model.detector import available_cores
from tests.benchmarks.measuring import machine
from training.coco import CocoDataSet, load_coco
from training.config import TrainConfig
from training.data import load_batches, schedule
from training.demo.draw import draw_data_set
from training.distributed import ALONE
from training.loss.losses import matched_losses
from training.presets import PRESETS
from training.state import TrainState, new_state
from training.train import TrainingForward, begin_step, match_step

STEPS_IN_A_TURN = 4
"""The first of a turn is not timed: its batch was loaded while the other side computed."""
STEPS_FOR_MEMORY = 3
Step = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    config: TrainConfig
    data: Path
    workers: int

    @property
    def training_set(self) -> CocoDataSet:
        return load_coco(self.data, "train")


def initial_state(setting: Setting) -> TrainState:
    num_classes = len(setting.training_set.labels)
    return new_state(setting.config, num_classes, torch.device("cpu"), ALONE, pretrained=False)


def our_steps(setting: Setting) -> Step:
    """Do what the loop of training.train does for a step in one part, without its logging."""
    config, state = setting.config, initial_state(setting)
    predict = TrainingForward(state.network, config.precision, config.channels_last)
    batches = load_batches(setting.training_set, config, first_step=0, workers=setting.workers)

    def step() -> object:
        begin_step(state, config)
        batch = next(batches)
        anchors = state.network.anchors_of(batch.canvas)
        matches = match_step(batch, anchors, config, state.step)
        divisors = state.loss_divisors(matches, config.loss.normaliser, ALONE)
        predictions = predict(batch.images, batch.sizes)
        total = matched_losses(predictions, anchors, batch.targets, matches, divisors, config.loss).total
        total.backward()  # type: ignore[no-untyped-call]
        value = total.item()
        state.update(gradient_clip=config.optimiser.gradient_clip, ema_decay=config.optimiser.ema_decay)
        return value

    return step


def their_steps(setting: Setting) -> Step:
    """Do what torchvision's train_one_epoch does for a step, without its logging."""
    config = setting.config
    resnet = RESNETS[config.model.backbone](norm_layer=FrozenBatchNorm2d)
    backbone = _resnet_fpn_extractor(resnet, 3, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
    model = TheirRetinaNet(
        backbone,
        len(setting.training_set.labels),
        min_size=config.resize.shorter_side,
        max_size=config.resize.longest_side,
    )
    model.load_state_dict(initial_state(setting).network.state_dict())
    model.train()
    optimiser = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.optimiser.learning_rate,
        momentum=config.optimiser.momentum,
        weight_decay=config.optimiser.weight_decay,
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimiser, start_factor=1 / 1000, total_iters=1000)
    batches = their_batches(setting)

    def step() -> object:
        images, targets = next(batches)
        losses = sum(model(list(images), list(targets)).values())
        value = losses.item()
        optimiser.zero_grad()
        losses.backward()
        optimiser.step()
        warmup.step()
        return value

    return step


class TheirSamples(Dataset[Any]):
    """As the reference's presets have it: PIL, a random flip, floats; the resize is the model's."""

    def __init__(self, data_set: CocoDataSet) -> None:
        self.data_set = data_set

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        picture = self.data_set.pictures[index]
        image = F.pil_to_tensor(Image.open(picture.file).convert("RGB"))
        boxes = torch.from_numpy(picture.target.boxes.copy())
        if torch.rand(1) < 0.5:
            image = F.horizontal_flip(image)
            boxes = (
                boxes[:, [2, 1, 0, 3]] * torch.tensor([-1.0, 1, -1, 1]) + torch.tensor([1.0, 0, 1, 0]) * image.shape[2]
            )
        return F.to_dtype(image, torch.float32, scale=True), {
            "boxes": boxes,
            "labels": torch.from_numpy(picture.target.columns.copy()),
        }


def their_batches(setting: Setting) -> Iterator[Any]:
    """The pictures of our steps."""
    training_set = setting.training_set
    config = setting.config
    sizes = [picture.size for picture in training_set.pictures]
    steps = schedule(sizes, config.augment, config.batch_size, config.seed, group_by_aspect=config.group_by_aspect)
    loader = DataLoader(
        TheirSamples(training_set),
        batch_sampler=([key.index for key in step] for step in steps),
        num_workers=setting.workers,
        collate_fn=as_tuples,
        multiprocessing_context="spawn" if setting.workers else None,
    )
    return iter(loader)


def as_tuples(samples: list[Any]) -> tuple[Any, ...]:
    return tuple(zip(*samples, strict=True))


def take_turns(rounds: int, *sides: Step) -> list[float]:
    """Median seconds of a step of each side."""
    seconds: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds + 1):
        for taken, step in zip(seconds, sides, strict=True):
            step()
            for _ in range(STEPS_IN_A_TURN - 1):
                started = time.perf_counter()
                step()
                if turn:
                    taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in seconds]


def seconds_to_load(setting: Setting, count: int) -> float:
    """Mean seconds for a batch with nobody computing, once the workers run."""
    batches = load_batches(setting.training_set, setting.config, first_step=0, workers=setting.workers)
    for _ in range(4 * setting.workers):  # what is loaded ahead
        next(batches)
    started = time.perf_counter()
    for _ in islice(batches, count):
        pass
    return (time.perf_counter() - started) / count


def peak_memory(side: str, arguments: list[str]) -> float:
    """GiB of a process of its own, loading its samples itself."""
    command = [sys.executable, "-m", "tests.benchmarks.training", *arguments, "--memory-of", side]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_own_peak_memory(steps: Step) -> None:
    for _ in range(STEPS_FOR_MEMORY):
        steps()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", choices=RESNETS, default="resnet50")
    parser.add_argument("--shorter-side", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2, help="processes that load samples, on each side")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, help="our layout")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of ours; theirs is fp32")
    parser.add_argument("--memory-of", choices=("ours", "theirs"), help="print the peak memory of one side, in GiB")
    parser.add_argument("--data", type=Path, help="a COCO-format data set instead of one drawn for the occasion")
    return parser.parse_args()


def setting_of(options: argparse.Namespace, data: Path, workers: int) -> Setting:
    preset = PRESETS["torchvision-v1"]
    side = options.shorter_side
    config = replace(
        preset,
        model=replace(preset.model, backbone=options.backbone),
        resize=replace(preset.resize, shorter_side=side, longest_side=side * 1333 // 800),
        augment=replace(preset.augment, shorter_sides=(side,)),
        batch_size=options.batch_size,
        channels_last=options.channels_last,
        precision=options.precision,
        pretrained_backbone=False,
    )
    return Setting(config, data, workers)


def main() -> int:
    options = parsed()
    torch.set_num_threads(available_cores())
    if options.memory_of:
        setting = setting_of(options, options.data, workers=0)
        print_own_peak_memory(our_steps(setting) if options.memory_of == "ours" else their_steps(setting))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        data = options.data
        if data is None:
            data = Path(folder) / "shapes"
            draw_data_set(data, images=options.pictures, validation_images=1, seed=0)
        setting = setting_of(options, data, options.workers)
        loading = seconds_to_load(setting, 8 * options.rounds)
        ours, theirs = take_turns(options.rounds, our_steps(setting), their_steps(setting))
        same = ["--backbone", options.backbone, "--shorter-side", str(options.shorter_side)]
        same += ["--batch-size", str(options.batch_size), "--data", str(data)]
        same += ["--precision", options.precision]
        if options.channels_last is not None:
            same += ["--channels-last" if options.channels_last else "--no-channels-last"]
        our_memory, their_memory = (peak_memory(side, same) for side in ("ours", "theirs"))
    print_table(options, ours, theirs, loading, our_memory, their_memory)
    return 0


LAYOUTS = {True: "last", False: "first", None: "as by default on this CPU"}


def print_table(
    options: argparse.Namespace, ours: float, theirs: float, loading: float, our_memory: float, their_memory: float
) -> None:
    print(
        f"{machine()}, torch {torch.__version__}, torchvision {torchvision.__version__}; {options.backbone}, shorter "
        f"side {options.shorter_side} px, {options.batch_size} images a step, {options.workers} loading processes, "
        f"ours {options.precision}, channels {LAYOUTS[options.channels_last]}, "
        f"medians of {options.rounds} turns of {STEPS_IN_A_TURN - 1} steps, `python -m tests.benchmarks.training`\n"
    )
    print("| measured | ours | torchvision's | ratio | reach |\n|---|---|---|---|---|")
    print(f"| training steps a second | {1 / ours:.3f} | {1 / theirs:.3f} | {theirs / ours:.2f} | ≥ 1.15 |")
    print(
        f"| batches loaded a second, alone, over our steps a second | {1 / loading:.2f} "
        f"| | {ours / loading:.1f} | ≥ 2 |"
    )
    print(
        f"| peak memory of the process, GiB | {our_memory:.2f} | {their_memory:.2f} "
        f"| {our_memory / their_memory:.2f} | ≤ 1 |"
    )


if __name__ == "__main__":
    sys.exit(main())
