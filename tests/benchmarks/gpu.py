"""What the detector does on the GPU at hand, beside what else the same GPU could do.

    python -m tests.benchmarks.gpu --out DIR [--sections NAMES] [--minutes N]
    python -m tests.benchmarks.gpu --out DIR --device cpu --quick      the same code on a CPU, to see that it works

Needs a GPU with its driver, and the extras gpu, training and dev; without a GPU it says so and exits with code 2.
The model is a ResNet-50 RetinaNet of 80 classes with random weights, exported as `training export` does: speed does
not depend on the weights. Nothing else should run on the machine.

Each section is a process of its own, so that one that fails, hangs or loses the device takes no other with it; what it
had measured by then is kept. Prints markdown; DIR gets a NAME.json for each section and a NAME.log of what went wrong.

    machine   GPU, driver, versions, commit                 peak      the matrix product that this GPU reaches
    models    the files that the others run                 speed     every canvas, batch and precision
    options   NHWC, fused bias, against neither             torch     the same weights in torch, eager and compiled
    stages    copies, network, top-k, decode                graph     a CUDA graph, captured and replayed
    service   POST /detect with many clients                published what others have measured elsewhere
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime as ort

from model.image import decode_image, to_canvas
from model.metadata import ResizePolicy
from model.runtime.cores import available_cores
from model.runtime.cuda import BYTES_PER_PIXEL, CudaRuntime
from model.runtime.cuda_device import CudaDevice
from model.runtime.cuda_session import (
    Buffers,
    CudaOptions,
    InputShape,
    Memory,
    fixed_shape_options,
    host_memory,
    open_on_cuda,
    preload_cuda,
)
from model.runtime.session import CPU, CUDA, has_cuda_build, operators_on
from model.types import CanvasImage
from tests.benchmarks.speed import photo
from tests.support.load import address
from tests.support.serving import server_process, wait_until

MEMORY_LIMIT_BYTES = 2**40
"""None, that is: what does not fit fails, and its row says so."""
READY_SECONDS = 300
"""A session for each of the common canvases and batch sizes is opened before."""
DEFAULT_OPTIONS = CudaOptions()
SETTLE_RUNS = 3
"""Before what counts: the first run plans the convolutions, the next two may still take memory."""


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long."""

    device: Memory
    canvases: tuple[tuple[int, int], ...]
    """(height, width); the first is the one that the roofline and the other sections are about."""
    batches: tuple[int, ...]
    precisions: tuple[str, ...]
    clients: tuple[int, ...]
    picture: tuple[int, int]
    """(width, height) of the JPEG that clients send; its canvas is the first."""
    resize: ResizePolicy
    serving_batch: int
    matrix: int
    """Side of the matrices multiplied for the peak."""
    seconds: float
    """Of each measurement, at least."""
    quick: bool


FULL = Plan(
    device="cuda",
    canvases=((800, 1088), (800, 800), (800, 1216), (768, 1344), (1088, 800)),
    batches=(1, 2, 4, 8, 16, 32),
    precisions=("fp32", "tf32", "fp16"),
    clients=(1, 8, 32, 128),
    picture=(1280, 960),
    resize=ResizePolicy(),
    serving_batch=8,
    matrix=8192,
    seconds=1.0,
    quick=False,
)
QUICK = Plan(
    device="cuda",
    canvases=((128, 192), (128, 128)),
    batches=(1, 2),
    precisions=("fp32", "fp16"),
    clients=(2,),
    picture=(192, 128),
    resize=ResizePolicy(shorter_side=128, longest_side=224),
    serving_batch=2,
    matrix=256,
    seconds=0.05,
    quick=True,
)


@dataclass
class Report:
    """A table that a section fills, and stores after each row: what is there when it ends early, is kept."""

    head: list[str]
    path: Path
    rows: list[list[Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *row: Any) -> None:
        self.rows.append(list(row))
        self.store()

    def attempt(self, key: Sequence[Any], measure: Callable[[], Sequence[Any]]) -> None:
        """A row of the key and what is measured, or of the key and why not."""
        try:
            self.add(*key, *measure())
        except Exception as error:  # a row's boundary: out of memory, or not supported; the next may do
            traceback.print_exc()
            self.add(*key, f"failed: {one_line(error)}")

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.store()

    def store(self) -> None:
        content = {"head": self.head, "rows": self.rows, "notes": self.notes}
        self.path.write_text(json.dumps(content, indent=1) + "\n")


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def significant(value: float) -> float:
    """Four digits of it: what a slow machine reaches is not rounded to nothing."""
    return float(f"{value:.4g}")


# Measuring


def median_seconds(action: Callable[[], object], seconds: float) -> float:
    """Of one call; as many as fill the time, at least five."""
    for _ in range(SETTLE_RUNS):
        action()
    taken: list[float] = []
    while len(taken) < 5 or sum(taken) < seconds:
        started = time.perf_counter()
        action()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def in_turns(seconds: float, *actions: Callable[[], object]) -> list[float]:
    """The median of each, measured in turns: what slows the machine down slows all of them."""
    for action in actions:
        for _ in range(SETTLE_RUNS):
            action()
    taken: list[list[float]] = [[] for _ in actions]
    end = time.perf_counter() + seconds * len(actions)
    while len(taken[0]) < 5 or time.perf_counter() < end:
        for each, action in zip(taken, actions, strict=True):
            started = time.perf_counter()
            action()
            each.append(time.perf_counter() - started)
    return [statistics.median(each) for each in taken]


def blank(height: int, width: int, count: int) -> list[CanvasImage]:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return [CanvasImage(pixels, (height, width), (height, width))] * count


# Sessions


def open_session(
    model: bytes, shape: InputShape, device: Memory, options: CudaOptions = DEFAULT_OPTIONS
) -> ort.InferenceSession:
    if device == "cuda":
        preload_cuda()
        return open_on_cuda(model, shape, MEMORY_LIMIT_BYTES, options)
    return ort.InferenceSession(model, fixed_shape_options(shape, available_cores()), providers=[CPU])


def open_lane(model: bytes, shape: InputShape, device: Memory, options: CudaOptions = DEFAULT_OPTIONS) -> Buffers:
    """With random pictures laid in."""
    lane = Buffers(open_session(model, shape, device, options), shape, device)
    lane.load(blank(shape.height, shape.width, shape.batch))
    return lane


def model_bytes(folder: Path, precision: str) -> bytes:
    return (folder / ("fp16.onnx" if precision == "fp16" else "fp32.onnx")).read_bytes()


def fastest_precision(plan: Plan) -> str:
    """What a GPU is served with; a CPU has no half-precision arithmetic."""
    return "fp16" if plan.device == "cuda" else "fp32"


def gigaflop(folder: Path, height: int, width: int) -> float | None:
    """Of one image, by the models section."""
    path = folder / "gigaflop.json"
    counted = json.loads(path.read_text()) if path.exists() else {}
    return counted.get(f"{height}x{width}")


def peak_teraflops(folder: Path, precision: str) -> float | None:
    path = folder / "peak.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return next((row[1] for row in rows if row[0] == precision and isinstance(row[1], float)), None)


# Sections


def machine(plan: Plan, folder: Path) -> None:
    import torch

    report = Report(["", ""], folder / "machine.json")
    if plan.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        report.add("GPU", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        report.attempt(
            ["driver, clock, power limit"],
            lambda: [subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]],
        )
    report.add("CPU", f"{available_cores()} cores")
    report.add(
        "versions", f"Python {platform.python_version()}, ONNX Runtime {ort.__version__}, torch {torch.__version__}"
    )
    commit = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False)
    report.add("commit", commit.stdout.strip())


def models(plan: Plan, folder: Path) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from training.checkpoint import build_detector
    from training.exchange.onnx_file import export

    report = Report(["file", "MB", "seconds"], folder / "models.json")
    checkpoint = random_checkpoint(plan)
    network = build_detector(checkpoint).network.to("meta")
    counted = {}
    for height, width in plan.canvases:
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, height, width, device="meta"))
        counted[f"{height}x{width}"] = counter.get_total_flops() / 1e9
    (folder / "gigaflop.json").write_text(json.dumps(counted))
    each = ", ".join(f"{canvas}: {value:.1f}" for canvas, value in counted.items())
    report.note(f"GFLOP of one image (2 per multiplication, counted by torch): {each}")
    for precision in ("fp32", "fp16"):
        started = time.perf_counter()
        export(checkpoint, folder / f"{precision}.onnx", name="gpu-benchmark", precision=precision)  # type: ignore[arg-type]
        size = (folder / f"{precision}.onnx").stat().st_size
        report.add(f"{precision}.onnx", round(size / 1e6, 1), round(time.perf_counter() - started, 1))


def random_checkpoint(plan: Plan) -> Any:
    """The same weights each time: they come from a seed."""
    from model.retinanet import RetinaNetConfig
    from tests.support.networks import tiny_checkpoint

    if plan.quick:
        return tiny_checkpoint(resize=plan.resize)
    return tiny_checkpoint(80, RetinaNetConfig(backbone_norm="batch"), resize=plan.resize)


def peak(plan: Plan, folder: Path) -> None:
    import torch

    report = Report(["precision", "TFLOP/s", "ms"], folder / "peak.json")
    report.note(f"torch.matmul of two {plan.matrix} × {plan.matrix} matrices")
    for precision in plan.precisions:
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        dtype = torch.float16 if precision == "fp16" else torch.float32
        one, other = (torch.randn(plan.matrix, plan.matrix, device=plan.device, dtype=dtype) for _ in range(2))

        report.attempt([precision], partial(multiplied, plan, one, other))


def multiplied(plan: Plan, one: Any, other: Any) -> list[float]:
    import torch

    def multiply() -> None:
        torch.matmul(one, other)
        _wait(plan)

    seconds = median_seconds(multiply, plan.seconds)
    return [significant(2 * plan.matrix**3 / seconds / 1e12), round(seconds * 1e3, 3)]


def _wait(plan: Plan) -> None:
    """For torch, whose calls return before the GPU has done them."""
    import torch

    if plan.device == "cuda":
        torch.cuda.synchronize()


def speed(plan: Plan, folder: Path) -> None:
    """The session alone: pictures are on the device, answers stay there. See stages for the copies."""
    head = ["canvas", "batch", "precision", "images/s", "ms per batch", "TFLOP/s", "share of the matmul peak"]
    report = Report(head, folder / "speed.json")
    for (height, width), precision, batch in itertools.product(plan.canvases, plan.precisions, plan.batches):
        shape = InputShape(batch, height, width)
        report.attempt([f"{height}×{width}", batch, precision], partial(session_speed, plan, folder, shape, precision))
    session = open_session(model_bytes(folder, "fp32"), InputShape(1, *plan.canvases[0]), plan.device)
    for provider in (CUDA, CPU):
        report.note(f"{provider} runs: {', '.join(sorted(operators_on(session, provider))) or 'nothing'}")


def session_speed(plan: Plan, folder: Path, shape: InputShape, precision: str) -> list[Any]:
    lane = open_lane(model_bytes(folder, precision), shape, plan.device, CudaOptions(use_tf32=precision != "fp32"))
    seconds = median_seconds(lane.run, plan.seconds)
    return [round(shape.batch / seconds, 1), round(seconds * 1e3, 2), *roofline(folder, shape, precision, seconds)]


def roofline(folder: Path, shape: InputShape, precision: str, seconds: float) -> list[Any]:
    flop = gigaflop(folder, shape.height, shape.width)
    if flop is None:
        return ["not counted", "not known"]
    rate = flop * shape.batch / seconds / 1e3
    reached = peak_teraflops(folder, precision)
    return [significant(rate), "not measured" if reached is None else f"{rate / reached:.1%}"]


def options(plan: Plan, folder: Path) -> None:
    report = Report(["precision", "batch", "NHWC", "fused bias", "ms", "over neither"], folder / "options.json")
    if plan.device == "cpu":
        report.note("these are options of CUDA: on a CPU all four are the same session")
    precision = fastest_precision(plan)
    for batch in sorted({1, plan.serving_batch}):
        shape = InputShape(batch, *plan.canvases[0])
        variants = list(itertools.product((False, True), repeat=2))
        lanes = [
            open_lane(
                model_bytes(folder, precision), shape, plan.device, CudaOptions(prefer_nhwc=nhwc, fuse_conv_bias=fused)
            )
            for nhwc, fused in variants
        ]
        taken = in_turns(plan.seconds, *(lane.run for lane in lanes))
        for (nhwc, fused), seconds in zip(variants, taken, strict=True):
            report.add(precision, batch, nhwc, fused, round(seconds * 1e3, 2), round(taken[0] / seconds, 3))


def torch_section(plan: Plan, folder: Path) -> None:
    """In one process and in turns with ONNX Runtime; the answers are compared, so the weights are the same."""
    import torch

    from training.checkpoint import build_detector
    from training.exchange.onnx_file import half_network

    report = Report(["batch", "engine", "images/s", "ms", "ours over it"], folder / "torch.json")
    precision = fastest_precision(plan)
    detector = build_detector(random_checkpoint(plan))
    detector = (half_network(detector) if precision == "fp16" else detector).to(plan.device)
    detector.network.to(memory_format=torch.channels_last)
    backend = "eager" if plan.quick else "inductor"
    report.note(f"torch in {precision}, channels-last; torch.compile by {backend}, of shapes that it knows")
    for batch in sorted({1, plan.serving_batch, plan.batches[-1]}):
        shape = InputShape(batch, *plan.canvases[0])
        pictures = blank(shape.height, shape.width, batch)
        images = torch.from_numpy(np.stack([canvas.pixels for canvas in pictures])).to(plan.device)
        sizes = torch.tensor([canvas.size for canvas in pictures], device=plan.device)
        for name in ("eager", "compiled"):
            engine = torch.compile(detector, dynamic=False, backend=backend) if name == "compiled" else detector
            report.attempt([batch, f"torch {name}"], partial(against_torch, plan, folder, shape, engine, images, sizes))


def against_torch(plan: Plan, folder: Path, shape: InputShape, engine: Any, images: Any, sizes: Any) -> list[Any]:
    import torch

    lane = open_lane(model_bytes(folder, fastest_precision(plan)), shape, plan.device)

    def run() -> Any:
        with torch.inference_mode():
            outputs = engine(images, sizes)
        _wait(plan)
        return outputs

    lane.run()
    theirs = run()[1].float().cpu().sort(descending=True).values[:, :100].numpy()
    ours = -np.sort(-lane.read(shape.batch)[1])[:, :100]
    assert np.abs(ours - theirs).mean() < 0.02, "these are not the same weights"
    own, other = in_turns(plan.seconds, lane.run, run)
    return [round(shape.batch / other, 1), round(other * 1e3, 2), f"{other / own:.3f} ×"]


def stages(plan: Plan, folder: Path) -> None:
    """By graphs cut off earlier and earlier: profilers tell when a kernel was launched, not how long it took."""
    import onnx

    report = Report(["batch", "stage", "ms", "share of the run"], folder / "stages.json")
    precision = fastest_precision(plan)
    whole = onnx.load(folder / f"{precision}.onnx")
    parts = [cut(whole, network_outputs(whole)), cut(whole, top_k_outputs(whole)), whole]
    for batch in sorted({1, plan.serving_batch}):
        shape = InputShape(batch, *plan.canvases[0])
        lanes = [open_lane(part.SerializeToString(), shape, plan.device) for part in parts]
        network, selected, run = in_turns(plan.seconds, *(lane.run for lane in lanes))
        names = ("network", "top-k, with the maxima before and the gathers between", "decode, sigmoid, labels")
        for name, seconds in zip(names, (network, selected - network, run - selected), strict=True):
            report.add(batch, name, round(seconds * 1e3, 3), f"{seconds / run:.1%}")
        pictures, target = blank(shape.height, shape.width, batch), lanes[2].inputs["images"]
        ordinary, page_locked = np.zeros((*shape, 3), np.uint8), host_memory((*shape, 3), np.uint8, plan.device).numpy()
        copies = {
            "lay in and upload": partial(lanes[2].load, pictures),
            "upload alone, ordinary memory": partial(target.update_inplace, ordinary),
            "upload alone, memory as served": partial(target.update_inplace, page_locked),
            "read the answers": partial(lanes[2].read, batch),
        }
        for name, seconds in zip(copies, in_turns(plan.seconds, *copies.values()), strict=True):
            report.add(batch, name, round(seconds * 1e3, 3), f"{seconds / run:.1%}")
    listed = any(device.ep_name == CUDA for device in ort.get_ep_devices())
    report.note(f"page-locked memory: {'offered by ONNX Runtime' if listed else 'not offered, ordinary memory served'}")


def network_outputs(model: Any) -> list[str]:
    """Of the ten output layers: what the convolutions make and no convolution reads."""
    from training.exchange.int8 import network_nodes

    nodes = network_nodes(model)
    read = {name for node in nodes for name in node.input}
    return [name for node in nodes for name in node.output if name not in read]


def top_k_outputs(model: Any) -> list[str]:
    return [name for node in model.graph.node if node.op_type == "TopK" for name in node.output]


def cut(model: Any, outputs: Sequence[str]) -> Any:
    """The part of the graph that makes these."""
    import onnx

    part = onnx.ModelProto()
    part.CopyFrom(model)
    wanted, kept = set(outputs), []
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    del part.graph.node[:], part.graph.output[:]
    part.graph.node.extend(reversed(kept))
    part.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs)
    return part


def graph(plan: Plan, folder: Path) -> None:
    report = Report(
        ["batch", "ms launched", "ms replayed", "ratio", "largest difference of a score"], folder / "graph.json"
    )
    if plan.device == "cpu":
        report.note("CUDA graphs exist on CUDA only: nothing was captured")
        return
    for batch in sorted({1, plan.serving_batch}):
        report.attempt([batch], partial(replayed, plan, folder, InputShape(batch, *plan.canvases[0])))


def replayed(plan: Plan, folder: Path, shape: InputShape) -> list[Any]:
    model = model_bytes(folder, fastest_precision(plan))
    plain = open_lane(model, shape, plan.device)
    captured = open_lane(model, shape, plan.device, CudaOptions(capture_graph=True))
    launched, replayed = in_turns(plan.seconds, plain.run, captured.run)
    # Other pictures than those it was captured with: a graph that replays old values shows here.
    turned = [replace(canvas, pixels=canvas.pixels[::-1].copy()) for canvas in blank(*shape[1:], shape.batch)]
    for lane in (plain, captured):
        lane.load(turned)
        lane.run()
    difference = np.abs(plain.read(shape.batch)[1] - captured.read(shape.batch)[1]).max()
    return [round(launched * 1e3, 2), round(replayed * 1e3, 2), f"{launched / replayed:.3f}", float(difference)]


def service(plan: Plan, folder: Path) -> None:
    """JPEG in, JSON out. Clients are coroutines of this process, the service is a process of its own."""
    report = Report(["", "images/s", "p50 ms", "p99 ms", "over the bare sessions"], folder / "service.json")
    precision, width, height = fastest_precision(plan), *plan.picture
    jpeg = photo(width, height)
    canvas = to_canvas(decode_image(jpeg), plan.resize)
    assert canvas.canvas_size == plan.canvases[0], "the clients' picture has another canvas than the benchmark"
    bare = bare_rate(model_bytes(folder, precision), canvas, plan)
    report.add(f"the sessions, batch {plan.serving_batch}, copies beside runs", round(bare, 1), "", "", "")
    flags = ["--device", plan.device, "--queue-capacity", str(4 * max(plan.clients))]
    flags += ["--max-batch-size", str(plan.serving_batch), *memory_flags(plan)]
    with server_process(folder, *flags, model_path=folder / f"{precision}.onnx", ready=False) as server:
        wait_until(lambda: server.process.poll() is not None or is_ready(server.url), READY_SECONDS)
        for clients in plan.clients:
            report.attempt([f"the service, {clients} clients"], partial(served, plan, server.url, jpeg, clients, bare))
    report.note(f"JPEG of {width} × {height}, {len(jpeg) / 1e3:.0f} kB, decoded by {available_cores()} threads")


def memory_flags(plan: Plan) -> list[str]:
    """Room for the sessions of every common canvas and batch: most of the card."""
    if plan.device == "cpu":
        return []
    import torch

    return ["--gpu-memory-limit-bytes", str(torch.cuda.get_device_properties(0).total_memory * 3 // 4)]


def is_ready(url: str) -> bool:
    return httpx.get(url + "/readyz").status_code == 200


def served(plan: Plan, url: str, jpeg: bytes, clients: int, bare: float) -> list[Any]:
    latencies, seconds = asyncio.run(ask_constantly(url, jpeg, clients, 10 * plan.seconds))
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    rate = len(latencies) / seconds
    return [round(rate, 1), round(p50, 1), round(p99, 1), f"{rate / bare:.3f}"]


def bare_rate(model: bytes, canvas: CanvasImage, plan: Plan) -> float:
    """Images per second of full batches from two threads, as the service's device threads run them."""
    sessions = CudaRuntime(
        lambda shape: open_session(model, shape, plan.device),
        CudaDevice(plan.device, MEMORY_LIMIT_BYTES, DEFAULT_OPTIONS),
        plan.resize,
        weight_bytes=len(model),
        bytes_per_pixel=BYTES_PER_PIXEL["fp32"],
    )
    batch = [canvas] * plan.serving_batch
    for _ in range(SETTLE_RUNS):
        sessions.run(batch)
    end = time.perf_counter() + 5 * plan.seconds

    def run(_: int) -> int:
        count = 0
        while time.perf_counter() < end:
            sessions.run(batch)
            count += len(batch)
        return count

    started = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        count = sum(pool.map(run, range(2)))
    return count / (time.perf_counter() - started)


async def ask_constantly(url: str, jpeg: bytes, clients: int, seconds: float) -> tuple[list[float], float]:
    """Seconds of each answer that came after the first fifth of the time, and how long the rest of it was. Raises if an
    answer is not 200."""
    head = f"POST /detect HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
    request = head.encode() + jpeg
    begin = time.perf_counter() + seconds / 5
    end = begin + seconds
    latencies: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection(*address(url))
        with contextlib.closing(writer):
            while (started := time.perf_counter()) < end:
                writer.write(request)
                answer = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = next(line for line in answer.split(b"\r\n") if line.startswith(b"content-length:"))
                body = await reader.readexactly(int(length[15:]))
                if not answer.startswith(b"http/1.1 200"):
                    raise RuntimeError(f"the service answers {body[:200]!r}")
                answered = time.perf_counter()
                if answered >= begin:
                    latencies.append(answered - started)

    await asyncio.gather(*(client() for _ in range(clients)))
    return latencies, time.perf_counter() - begin


def published(plan: Plan, folder: Path) -> None:
    report = Report(["images/s", "hardware", "software and precision", "model and input", "how it differs from ours"],
                    folder / "published.json")  # fmt: skip
    report.add("1,877", "one H200 of eight, offline", "MLPerf Inference v4.1 (v5.1: 1,875), TensorRT, INT8",
               "RetinaNet ResNeXt-50, 264 classes, 800×800", "INT8; another backbone, more classes, a smaller canvas; "
               "no decoding of JPEGs, no HTTP; batch 48")  # fmt: skip
    report.add("76", "one RTX 4090, offline", "MLPerf Inference v5.1, ONNX Runtime CUDA, fp32",
               "RetinaNet ResNeXt-50, 264 classes, 800×800", "the same runtime; another card, another backbone, "
               "more classes, a smaller canvas; no JPEGs, no HTTP")  # fmt: skip
    report.add("93", "one A100, batch 1", "ODTK, TensorRT, FP16", "RetinaNet ResNet-50, 80 classes, 800 to 1280",
               "latency of one image (10.8 ms) turned into a rate; pictures padded to multiples of 128")  # fmt: skip
    report.note("published by their authors, not measured here")


SECTIONS: dict[str, Callable[[Plan, Path], None]] = {
    "machine": machine,
    "models": models,
    "peak": peak,
    "speed": speed,
    "options": options,
    "torch": torch_section,
    "stages": stages,
    "graph": graph,
    "service": service,
    "published": published,
}


# The processes


def run_section(name: str, given: argparse.Namespace, seconds: float) -> str | None:
    """In a process of its own; why it did not end well, or None."""
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--only", name, "--out", str(given.out)]
    command += ["--device", given.device, *(["--quick"] if given.quick else [])]
    log_path = given.out / f"{name}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            return "stopped: the time was up"
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it started, a server, must not outlive it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    return None if code == 0 else f"failed (exit code {code}): {lines[-1][:300] if lines else 'it said nothing'}"


def show(name: str, folder: Path, failure: str | None) -> str:
    path = folder / f"{name}.json"
    content = json.loads(path.read_text()) if path.exists() else {"head": [], "rows": [], "notes": []}
    if failure is not None:
        content["notes"].append(failure)
        path.write_text(json.dumps(content | {"failure": failure}, indent=1) + "\n")
    lines = [f"## {name}\n"]
    if content["rows"]:
        width = len(content["head"])
        lines += ["| " + " | ".join(content["head"]) + " |", "|---" * width + "|"]
        for row in content["rows"]:
            lines.append("| " + " | ".join(str(value) for value in [*row, *[""] * (width - len(row))]) + " |")
    return "\n".join([*lines, *(f"\n{note}" for note in content["notes"])]) + "\n"


def why_no_gpu() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None if has_cuda_build() else "this ONNX Runtime is built without CUDA: install the extra gpu, not cpu"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON, logs and the models")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model, moments instead of seconds: shows no speed")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="separated by commas; the rest is left as it is")
    parser.add_argument(
        "--minutes", type=float, default=25, help="for all of it; what is not done by then is left [25]"
    )
    parser.add_argument("--only", choices=SECTIONS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.sections = given.sections.split(",")
    if unknown := set(given.sections) - set(SECTIONS):
        parser.error(f"unknown sections {', '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    return given


def main() -> int:
    given = parse()
    if given.only:
        plan = replace(QUICK if given.quick else FULL, device=given.device)
        SECTIONS[given.only](plan, given.out)
        return 0
    if given.device == "cuda" and (reason := why_no_gpu()):
        print(f"no GPU to measure: {reason}", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * given.minutes
    failures = 0
    for name in given.sections:
        (given.out / f"{name}.json").unlink(missing_ok=True)
        left = end - time.monotonic()
        if name != given.sections[-1]:
            left /= 2  # however long it takes, there is time for the others
        failure = run_section(name, given, left) if left > 0 else "not run: the time was up"
        failures += failure is not None
        print(show(name, given.out, failure), flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
