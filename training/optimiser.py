"""The update of the weights: learning rate, weight decay, batch norm's mode, the moving average."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.retinanet import RetinaNet
from training.config import OptimiserConfig
from training.exchange.finetune import freeze_stages


def memory_format(channels_last: bool | None, device: torch.device) -> torch.memory_format:
    """Choose the memory layout of weights and images; None: the fastest on the device.

    Channels last, a step is 1.1 times as fast with AVX-512, and 0.85 times as fast with AVX2 (docs/benchmarks.md).
    """
    if channels_last is None:
        channels_last = device.type == "cuda" or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.channels_last if channels_last else torch.contiguous_format


def peak_learning_rate(config: OptimiserConfig, batch_size: int) -> float:
    """Scale the learning rate, which is for reference_batch_size images, with the images of a step (Goyal 2017)."""
    return config.learning_rate * batch_size / config.reference_batch_size


def learning_rate(config: OptimiserConfig, step: int, *, steps: int, batch_size: int) -> float:
    """Return the learning rate of the update after `step` of all `steps` updates: linear warm-up, then milestones or a
    cosine."""
    peak = peak_learning_rate(config, batch_size)
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "steps":
        return float(peak * 0.1 ** sum(step >= milestone * steps for milestone in config.milestones))
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return peak * (1 + math.cos(math.pi * done)) / 2


def set_train_mode(network: RetinaNet, *, frozen_stages: int, frozen_batch_norm: bool) -> None:
    """Put the network into training mode; a frozen batch norm uses its running statistics."""
    network.train()
    freeze_stages(network, frozen_stages)
    if frozen_batch_norm:
        for module in network.modules():
            if isinstance(module, _BatchNorm):  # SyncBatchNorm too
                module.eval()


def build_optimiser(network: nn.Module, config: OptimiserConfig) -> torch.optim.Optimizer:
    """Build the optimiser. Weight decay applies to convolutions' weights, not to biases and norms."""
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
    """Move the average towards the weights, faster in the first steps, so that the random start has no weight."""
    decay = min(decay, (1 + step) / (10 + step))
    for average, value in zip(_tensors(averaged), _tensors(network), strict=True):
        if average.is_floating_point():
            average.lerp_(value, 1 - decay)
        else:
            average.copy_(value)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
