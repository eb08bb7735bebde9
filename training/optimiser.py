"""The update of the weights: learning rate by step, weight decay by kind of weight, batch norm's mode, the average."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.retinanet import RetinaNet
from training.config import OptimiserConfig, TrainConfig
from training.exchange.finetune import freeze_stages


def memory_format(config: TrainConfig, device: torch.device) -> torch.memory_format:
    """Of the weights and the images."""
    channels_last = _wants_channels_last(device) if config.channels_last is None else config.channels_last
    return torch.channels_last if channels_last else torch.contiguous_format


def _wants_channels_last(device: torch.device) -> bool:
    """As measured in BENCHMARKS.md: with AVX-512 a step is 1.1 times as fast so, with AVX2 .85 times."""
    return device.type == "cuda" or torch.backends.cpu.get_cpu_capability() == "AVX512"


def peak_learning_rate(config: TrainConfig) -> float:
    """The learning rate is meant for reference_batch_size images and grows with the images of a step (Goyal 2017)."""
    return config.optimiser.learning_rate * config.batch_size / config.optimiser.reference_batch_size


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of the update that follows `step` updates: linear warm-up, then milestones or a cosine."""
    optimiser = config.optimiser
    peak = peak_learning_rate(config)
    if step < optimiser.warmup_steps:
        return peak * (step + 1) / optimiser.warmup_steps
    if optimiser.schedule == "steps":
        return float(peak * 0.1 ** sum(step >= milestone * config.steps for milestone in optimiser.milestones))
    done = (step - optimiser.warmup_steps) / max(1, config.steps - optimiser.warmup_steps)
    return peak * (1 + math.cos(math.pi * done)) / 2


def set_learning_rate(optimiser: torch.optim.Optimizer, config: TrainConfig, step: int) -> None:
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(config, step)


def set_train_mode(network: RetinaNet, config: TrainConfig, step: int) -> None:
    """Training mode, but batch norm by its running statistics once `freeze_batch_norm_from` of the steps are done."""
    network.train()
    freeze_stages(network, config.freeze_stages)
    if step >= config.optimiser.freeze_batch_norm_from * config.steps:
        for module in network.modules():
            if isinstance(module, _BatchNorm):  # SyncBatchNorm too
                module.eval()


def build_optimiser(network: nn.Module, config: OptimiserConfig) -> torch.optim.Optimizer:
    """Weight decay applies to convolutions' weights only: not to biases and norms."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimiser == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=True)


@torch.no_grad()
def update_average(averaged: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the weights; faster in the first steps, so that it soon forgets the random start."""
    decay = min(decay, (1 + step) / (10 + step))
    for average, value in zip(_tensors(averaged), _tensors(network), strict=True):
        if average.is_floating_point():
            average.lerp_(value, 1 - decay)
        else:
            average.copy_(value)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
