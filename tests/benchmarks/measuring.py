"""Shared parts of the benchmarks: pictures, models, turns, the machine's description, tables, virtual environments.

Times are noisy on shared machines, so a benchmark runs its contestants in turns within one run and reports ratios of
medians. Models and environments are kept in a cache folder.
"""

import argparse
import io
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import onnxruntime
from PIL import Image

from model.detector import available_cores
from model.image import decode_image, to_canvas
from model.metadata import MadeFor, ResizePolicy
from model.types import Candidates
from tests.support.serving import server_process

Action = Callable[[], object]
JPEG = {"Content-Type": "image/jpeg"}
CACHE = Path(".bench")
"""Ignored by git: models and virtual environments of the benchmarks."""
PLOTS = Path(__file__).parents[2] / "docs" / "figures" / "scale"
SIZES = (
    (640, 480), (480, 640), (500, 375), (1280, 720), (720, 1280), (800, 600), (1024, 768), (612, 612), (1920, 1080),
    (427, 640), (1600, 1200), (333, 500), (960, 720), (640, 427), (1080, 1080), (2048, 1536), (900, 600), (375, 500),
    (1366, 768), (3000, 2000),
)  # fmt: skip
"""(width, height) of the mixed pictures."""


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


def photo(width: int, height: int, seed: int = 0) -> bytes:
    """A JPEG with as much detail as a photograph: smooth noise at several scales."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), np.float32)
    for scale in (4, 16, 64):
        noise = rng.normal(0, 25, (height // scale + 1, width // scale + 1, 3)).astype(np.float32)
        pixels += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    buffer = io.BytesIO()
    Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@cache
def mixed_photos(count: int = len(SIZES)) -> list[bytes]:
    return [photo(width, height, seed) for seed, (width, height) in enumerate(SIZES[:count])]


def model_inputs(data: bytes, resize: ResizePolicy) -> dict[str, Any]:
    """Make a session's inputs for this picture."""
    canvas = to_canvas(decode_image(data), resize)
    return {"images": canvas.pixels[None], "sizes": np.array([canvas.size])}


def candidates(count: int, passing: int, classes: int = 80, objects: int = 60) -> Candidates:
    """As a busy picture gives them: `passing` of `count` boxes score above 0.05, in clusters around the objects."""
    rng = np.random.default_rng(0)
    centres, sizes = rng.uniform(0, 1000, (objects, 2)), rng.uniform(20, 300, (objects, 2))
    which = rng.integers(0, objects, count)
    centre = centres[which] + rng.normal(0, 12, (count, 2))
    size = sizes[which] * np.exp(rng.normal(0, 0.15, (count, 2)))
    scores = np.where(np.arange(count) < passing, rng.uniform(0.051, 1, count), rng.uniform(0, 0.049, count))
    boxes = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
    labels = rng.integers(0, classes, objects)[which]
    return Candidates(boxes.astype(np.float32), scores.astype(np.float32), labels)


def bare_session(model: Path) -> onnxruntime.InferenceSession:
    """ONNX Runtime as one uses it without this project: its defaults, on the cores available."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def post(client: httpx.Client, data: bytes) -> httpx.Response:
    return client.post("/detect", content=data, headers=JPEG).raise_for_status()


def start_to_ready(model: Path) -> float:
    """Seconds from the start of the process until /readyz says 200."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, server_process(Path(folder), model_path=model):
        return time.perf_counter() - started


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine() -> str:
    commit = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False)
    return (
        f"{available_cores()} cores of {cpu_model()}, Python {platform.python_version()}, "
        f"ONNX Runtime {onnxruntime.__version__}, commit {commit.stdout.strip()}"
    )


def command(module: str) -> str:
    """Return the typed command, for the text above a table."""
    return f"`{' '.join(['python -m', module, *sys.argv[1:]])}`"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def add_cache_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of models and virtual environments [.bench]")


def resnet50(folder: Path, layout: str = "v2", made_for: MadeFor = "any") -> Path:
    """torchvision's layout v1 or v2 with random weights that detect, 91 classes, shorter side 800. Beside it the
    checkpoint: `resnet50.pt`, of v1 `resnet50-v1.pt`."""
    from tests.support.networks import tiny_checkpoint
    from training.checkpoint import save_checkpoint
    from training.exchange.onnx_file import export
    from training.exchange.torchvision import ARCHITECTURES

    stem = "resnet50" if layout == "v2" else f"resnet50-{layout}"
    file = folder / (f"{stem}.onnx" if made_for == "any" else f"{stem}-{made_for}.onnx")
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        config = ARCHITECTURES["retinanet_resnet50_fpn_v2" if layout == "v2" else "retinanet_resnet50_fpn"].model
        checkpoint = tiny_checkpoint(91, config, resize=ResizePolicy())
        save_checkpoint(checkpoint, folder / f"{stem}.pt")
        export(checkpoint, file, name=stem, made_for=made_for)
    return file.absolute()


class InstallFailed(RuntimeError):
    """pip could not make the environment; the text is its first error."""


def environment(folder: Path, name: str, requirements: Sequence[str]) -> Path:
    """The Python of a virtual environment with exactly these requirements, made where it is missing."""
    home = (folder / name).absolute()
    python, done = home / "bin" / "python", home / "requirements.txt"
    wanted = "\n".join(requirements)
    if not (done.exists() and done.read_text() == wanted):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
        made = subprocess.run(pip, capture_output=True, text=True, check=False)
        if made.returncode:
            errors = [line for line in made.stderr.splitlines() if line.startswith("ERROR")]
            raise InstallFailed((errors or ["pip failed"])[0])
        done.write_text(wanted)
    return python
