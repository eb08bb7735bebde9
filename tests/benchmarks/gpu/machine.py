"""The sections `machine` and `models`: what is measured on, and the files that are."""

import json
import os
import platform
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime as ort

from model.runtime.cores import available_cores
from model.runtime.cuda_session import free_bytes, page_locked, preload_cuda
from tests.benchmarks.gpu.plan import Plan
from tests.benchmarks.gpu.report import Report, timed

NVIDIA_SMI = "nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.max.sm,power.limit --format=csv,noheader"
COMMANDS = {
    "GPU, memory, driver, clock, power limit": NVIDIA_SMI,
    "PCI devices by vendor": "cat /sys/bus/pci/devices/*/vendor | sort | uniq -c | tr -s ' \\n' ' '",
    "graphics cards in sysfs": "ls -m /sys/class/drm",
    "memory": "free -g | sed -n 2p",
    "commit": "git describe --always --dirty=+",
}


def machine(plan: Plan, report: Report) -> None:
    report.table("what", "on this machine")
    report.add("CPU", f"{available_cores()} cores")
    report.add("versions", f"Python {platform.python_version()}, ONNX Runtime {ort.__version__}")
    for what, command in COMMANDS.items():
        found = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        report.add(what, (found.stdout.strip() or found.stderr.strip())[:300])
    if plan.device == "cuda":
        preload_cuda()
        listed = [device.device.metadata for device in ort.get_ep_devices() if device.ep_name != "CPUExecutionProvider"]
        report.add("devices that ONNX Runtime lists", str([dict(metadata) for metadata in listed])[:300])
        report.add("page-locked memory", "offered" if page_locked("cuda") else "not offered")
        report.add("free on the card, GB", round((free_bytes() or 0) / 1e9, 1))
        mapped = Path("/proc/self/maps").read_text().split()
        report.add("libraries", ", ".join(sorted({os.path.realpath(name) for name in mapped if _is_cuda(name)})))


def _is_cuda(name: str) -> bool:
    return any(f"lib{library}.so" in name for library in ("cudnn", "cublasLt", "cudart", "cuda"))


def models(plan: Plan, report: Report) -> None:
    """Export a ResNet-50 RetinaNet of 80 classes with random weights: speed does not depend on them."""
    import torch

    from training.checkpoint import build_detector, save_checkpoint
    from training.exchange.onnx_file import export

    report.table("file", "MB", "seconds", "convolutions", "of them with a bias")
    checkpoint, seconds = timed(lambda: random_checkpoint(plan))
    save_checkpoint(checkpoint, plan.models / "random.pt")
    report.note(f"random weights that detect, in {seconds:.1f} s")
    network = build_detector(checkpoint).network.to("meta")
    counted = {f"{height}x{width}": _gigaflop(network, height, width) for height, width in plan.canvases}
    (plan.models / "gigaflop.json").write_text(json.dumps(counted))
    report.note(f"GFLOP of one image (2 per multiplication, counted by torch {torch.__version__}): {counted}")
    for precision in ("fp16", "fp32"):
        file = plan.models / f"{precision}.onnx"
        partial_file = file.with_suffix(".part")  # who waits for the file finds it whole
        _, seconds = timed(lambda: export(checkpoint, partial_file, name="random", precision=precision))  # noqa: B023
        partial_file.rename(file)
        report.add(file.name, round(file.stat().st_size / 1e6, 1), round(seconds, 1), *_biased(file))


def _biased(file: Path) -> tuple[int, int]:
    import onnx

    convolutions = [node for node in onnx.load(file).graph.node if node.op_type == "Conv"]
    return len(convolutions), sum(len(node.input) == 3 for node in convolutions)


def _gigaflop(network: Any, height: int, width: int) -> float:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, height, width, device="meta"))
    return round(counter.get_total_flops() / 1e9, 1)


def random_checkpoint(plan: Plan) -> Any:
    """Draw the weights from a seed, with a bias in each convolution and frozen norms, as trained models have them."""
    import torch
    from torch import nn

    from model.metadata import Label
    from model.retinanet import RetinaNet, RetinaNetConfig
    from tests.support.networks import TINY, draw, enliven
    from training.checkpoint import Checkpoint
    from training.config import TrainConfig

    config, num_classes = (TINY, 3) if plan.quick else (RetinaNetConfig(backbone_norm="batch"), 80)
    torch.manual_seed(0)
    network = RetinaNet(config, num_classes)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                layer.bias.normal_(std=0.05)
    enliven(network, [draw(128, 192, seed) for seed in range(4)])
    weights = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    frozen = TrainConfig(model=replace(config, backbone_norm="frozen"), resize=plan.resize)
    return Checkpoint(frozen, tuple(Label(number + 1, f"thing {number}") for number in range(num_classes)), weights)


def gigaflop(plan: Plan, height: int, width: int) -> float:
    """The arithmetic of one image, by the section `models`."""
    return float(json.loads((plan.models / "gigaflop.json").read_text())[f"{height}x{width}"])
