"""The detector's and the service's own cost, as ratios within one interleaved run.

    python -m tests.benchmarks.speed [--model FILE.onnx] [--rounds N]

Prints a markdown table: `make bench` puts it into BENCHMARKS.md. Nothing else should run on the machine.
"""

import argparse
import io
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import httpx
import numpy as np
import onnxruntime
from PIL import Image

from model.detector import PRETRAINED, Detector, available_cores
from model.image import decode_image, to_canvas
from model.metadata import ResizePolicy
from model.suppress import suppress
from model.types import Candidates
from tests.serving import server_process

Action = Callable[[], object]


def interleaved(rounds: int, *actions: Action) -> list[float]:
    """Median seconds of each action, taken in turns after one round that does not count."""
    seconds: list[list[float]] = [[] for _ in actions]
    for round_number in range(rounds + 1):
        for taken, action in zip(seconds, actions, strict=True):
            started = time.perf_counter()
            action()
            if round_number:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in seconds]


def photo(width: int, height: int) -> bytes:
    """A JPEG with as much detail as a photograph: smooth noise at several scales."""
    rng = np.random.default_rng(0)
    pixels = np.zeros((height, width, 3), np.float32)
    for scale in (4, 16, 64):
        noise = rng.normal(0, 25, (height // scale + 1, width // scale + 1, 3)).astype(np.float32)
        pixels += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    buffer = io.BytesIO()
    Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def pillow_decode_and_resize(data: bytes, size: tuple[int, int]) -> object:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize(size, Image.Resampling.BILINEAR))


def candidates(count: int, passing: int, classes: int = 80) -> Candidates:
    """As a busy picture gives them: `passing` of `count` boxes score above 0.05, in clusters around 60 objects."""
    rng = np.random.default_rng(0)
    centres, sizes = rng.uniform(0, 1000, (60, 2)), rng.uniform(20, 300, (60, 2))
    which = rng.integers(0, 60, count)
    centre = centres[which] + rng.normal(0, 12, (count, 2))
    size = sizes[which] * np.exp(rng.normal(0, 0.15, (count, 2)))
    scores = np.where(np.arange(count) < passing, rng.uniform(0.051, 1, count), rng.uniform(0, 0.049, count))
    boxes = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
    labels = rng.integers(0, classes, 60)[which]
    return Candidates(boxes.astype(np.float32), scores.astype(np.float32), labels)


def service_over_session(model: Path, rounds: int) -> tuple[float, float]:
    """Medians of POST /detect of a 1280 x 960 JPEG and of the bare session on the same canvas."""
    data = photo(1280, 960)
    detector = Detector(model, device="cpu")
    canvas = to_canvas(decode_image(data), detector.metadata.resize)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = {"images": canvas.pixels[None], "sizes": np.array([canvas.size])}
    with (
        tempfile.TemporaryDirectory() as folder,
        server_process(Path(folder), model_path=model) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        post, run = interleaved(
            rounds,
            lambda: client.post("/detect", content=data, headers={"Content-Type": "image/jpeg"}).raise_for_status(),
            lambda: session.run(None, inputs),
        )
    return post, run


def start_to_ready(model: Path) -> float:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, server_process(Path(folder), model_path=model):
        return time.perf_counter() - started


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    commit = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False)
    return (
        f"{available_cores()} cores of {cpu}, Python {platform.python_version()}, "
        f"ONNX Runtime {onnxruntime.__version__}, commit {commit.stdout.strip()}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=PRETRAINED)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    data = photo(1280, 960)
    post, run = service_over_session(options.model, options.rounds)
    ours, pillow = interleaved(
        options.rounds,
        lambda: to_canvas(decode_image(data), ResizePolicy()),
        lambda: pillow_decode_and_resize(data, (1066, 800)),
    )
    busy, worst = candidates(5000, 1700), candidates(5000, 5000, classes=1)
    limits = {"score_threshold": 0.05, "nms_threshold": 0.5, "max_detections": 300}
    nms, nms_worst = interleaved(
        options.rounds,
        lambda: suppress(busy, **limits),
        lambda: suppress(worst, **limits),  # type: ignore[arg-type]
    )
    ready = statistics.median(start_to_ready(options.model) for _ in range(3))
    print(f"{machine()}; medians of {options.rounds} interleaved rounds, `python -m tests.benchmarks.speed`\n")
    print("| measured | result | reach |\n|---|---|---|")
    print(f"| `POST /detect`, 1280×960 JPEG in, JSON out, over the bare session on its canvas ({run * 1e3:.0f} ms) "
          f"| {post / run:.3f} | ≤ 1.25 |")  # fmt: skip
    print(f"| decode and resize of that JPEG, over Pillow's ({pillow * 1e3:.1f} ms) | {ours / pillow:.2f} | ≤ 0.6 |")
    print(f"| NMS of 5,000 candidates of which 1,700 pass 0.05 | {nms * 1e3:.2f} ms | ≤ 1 ms |")
    print(f"| the worst case: all 5,000 pass and are of one class | {nms_worst * 1e3:.2f} ms | |")
    print(f"| start of the process to ready | {ready:.1f} s | ≤ 5 s |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
