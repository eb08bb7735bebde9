"""The growth of cost with picture size, canvas, batch, classes, clients and objects.

    python -m tests.benchmarks.scale [--only SECTION ...] [--rounds N]

Each section prints a markdown table and writes a plot into docs/figures/scale. The last column is the growth from the
row before: 1 is linear, 0 is none, more than 1 is worse than linear. Nothing else should run on the machine. All take
about 6 minutes, and the first time 2 more for the files of many classes.
"""

import argparse
import asyncio
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from pydantic_core import to_json

from model.detector import Detector, available_cores
from model.image import decode_image, to_canvas
from model.pretrained import PRETRAINED
from model.types import Candidates, CanvasImage
from service.api.schemas import answer
from service.core.engine import postprocess
from service.core.job import Detected, Options, Stopwatch
from service.core.store import LoadedModel
from tests.benchmarks.compare import closed_loop, raw
from tests.benchmarks.measuring import (
    PLOTS,
    add_cache_flag,
    command,
    interleaved,
    machine,
    model_inputs,
    photo,
    post,
    table,
)
from tests.support.load import Footprint
from tests.support.serving import server_process
from tests.support.tiny_model import write_tiny_model

MIB = 1024**2
LONGEST_SIDES = (160, 320, 640, 1280, 2560, 5120, 8000)
BATCHES = (1, 2, 4, 8, 16)
CLASSES = (1, 10, 100, 1000)
CLIENTS = (1, 8, 64, 256, 512)
OBJECTS = (0, 1, 10, 30, 100, 300)


@dataclass(frozen=True)
class Curve:
    """One thing that grows, and what it costs."""

    name: str
    axis: str
    """Name of `sizes`."""
    sizes: Sequence[float]
    cost: str
    """Name of `seconds`."""
    seconds: Sequence[float]
    others: Sequence[tuple[str, Sequence[str]]] = ()
    """Further columns."""

    def growth(self) -> list[str]:
        """The exponent between each row and the one before, where both sizes are above 0."""
        pairs = zip(self.sizes, self.sizes[1:], self.seconds, self.seconds[1:], strict=False)
        return ["", *(f"{math.log(d / c) / math.log(b / a):.2f}" if a > 0 else "" for a, b, c, d in pairs)]

    def table(self) -> str:
        names = [name for name, _ in self.others]
        columns = [values for _, values in self.others]
        rows = zip(
            (f"{size:g}" for size in self.sizes), (f"{taken * 1e3:.2f}" for taken in self.seconds), *columns,
            self.growth(), strict=True,
        )  # fmt: skip
        return table((self.axis, f"{self.cost}, ms", *names, "growth"), rows)

    def plot(self, folder: Path) -> Path:
        """Both axes logarithmic, beside a line of linear growth through the last point."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        shown = [(size, taken * 1e3) for size, taken in zip(self.sizes, self.seconds, strict=True) if size > 0]
        sizes, milliseconds = zip(*shown, strict=True)
        figure, axes = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
        axes.loglog(sizes, milliseconds, "o-", label="measured")
        linear = [milliseconds[-1] * size / sizes[-1] for size in sizes]
        axes.loglog(sizes, linear, "--", color="grey", label="linear")
        axes.set(xlabel=self.axis, ylabel=f"{self.cost}, ms")
        axes.legend()
        folder.mkdir(exist_ok=True)
        file = folder / f"scale-{self.name}.png"
        figure.savefig(file, dpi=110)
        pyplot.close(figure)
        return file


def pictures(rounds: int, cache: Path) -> Iterator[Curve]:
    """Bytes to canvas, and the service's memory after each, smallest first. The canvas has one size for all."""
    detector = Detector(PRETRAINED, device="cpu")
    sizes = [(side, side * 3 // 4) for side in LONGEST_SIDES]
    photos = [photo(width, height) for width, height in sizes]
    resize = detector.metadata.resize
    seconds = interleaved(rounds, *(lambda data=data: to_canvas(decode_image(data), resize) for data in photos))  # type: ignore[misc]
    posted, resident = [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        server_process(Path(folder), "--max-image-bytes", "64MiB", model_path=PRETRAINED) as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        for data in photos:
            taken = [timed(lambda: post(client, data)) for _ in range(max(3, rounds // 2))]  # noqa: B023
            posted.append(f"{statistics.median(taken) * 1e3:.0f}")
            resident.append(f"{Footprint.of(server.process.pid).resident_bytes / MIB:.0f}")
    yield Curve(
        "pictures",
        "megapixels of the JPEG",
        [width * height / 1e6 for width, height in sizes],
        "decode and resize",
        seconds,
        [("POST /detect, ms", posted), ("service's memory, MiB", resident)],
    )


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def canvases(rounds: int, cache: Path) -> Iterator[Curve]:
    """The network against the canvas's area and against the batch, on the demo model; memory of a bare session."""
    detector = Detector(PRETRAINED, device="cpu")
    areas = [(128, 128), (256, 256), (512, 512), (1024, 1024)]
    blanks = [CanvasImage.uniform(size) for size in areas]
    seconds = interleaved(rounds, *(lambda canvas=canvas: detector.run([canvas]) for canvas in blanks))  # type: ignore[misc]
    memory = [session_memory(PRETRAINED, batch(canvas, 1)) for canvas in blanks]
    yield Curve(
        "canvases",
        "megapixels of the canvas",
        [height * width / 1e6 for height, width in areas],
        "inference",
        seconds,
        [("bare session's memory, MiB", memory)],
    )
    small = blanks[1]
    seconds = interleaved(rounds, *(lambda count=count: detector.run([small] * count) for count in BATCHES))  # type: ignore[misc]
    memory = [session_memory(PRETRAINED, batch(small, count)) for count in BATCHES]
    yield Curve("batches", "batch of 256×256", BATCHES, "inference", seconds, [("bare session's memory, MiB", memory)])


def batch(canvas: CanvasImage, count: int) -> dict[str, Any]:
    return {"images": np.stack([canvas.pixels] * count), "sizes": np.array([canvas.size] * count)}


def session_memory(model: Path, inputs: dict[str, Any]) -> str:
    """Resident MiB of a process that ran these inputs and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inputs.npz"
        np.savez(file, **inputs)
        script = Path(__file__).parent / "session_memory.py"
        arguments = [sys.executable, script, model, str(available_cores()), file]
        made = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return f"{int(made.stdout) / MIB:.0f}"


def classes(rounds: int, cache: Path) -> Iterator[Curve]:
    """A small network with ever more columns; the last convolution alone grows, and selection with it."""
    from tests.support.networks import tiny_checkpoint
    from training.exchange.onnx_file import export

    files = []
    for count in CLASSES:
        files.append(cache / f"classes-{count}.onnx")
        if not files[-1].exists():
            cache.mkdir(parents=True, exist_ok=True)
            export(tiny_checkpoint(count, lively=False), files[-1], name=f"classes-{count}")
    detectors = [Detector(file, device="cpu") for file in files]
    inputs = model_inputs(photo(640, 480), detectors[0].metadata.resize)
    canvas = CanvasImage(inputs["images"][0], tuple(inputs["sizes"][0]), (480, 640))
    seconds = interleaved(rounds, *(lambda each=each: each.run([canvas]) for each in detectors))  # type: ignore[misc]
    memory = [session_memory(file, inputs) for file in files]
    yield Curve("classes", "classes", CLASSES, "inference", seconds, [("bare session's memory, MiB", memory)])


def clients(rounds: int, cache: Path) -> Iterator[Curve]:
    """Throughput and p99 of a service whose inference costs next to nothing: what is left is its own work."""
    request = raw(photo(128, 96))
    seconds, rates, resident = [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_model(folder / "tiny.onnx")
        flags = ("--queue-capacity", str(max(CLIENTS)), "--request-timeout-seconds", "120")
        with server_process(folder, *flags, model_path=folder / "tiny.onnx") as server:
            asyncio.run(closed_loop(server.url, [request], 8, 200))
            for count in CLIENTS:
                runs = [asyncio.run(closed_loop(server.url, [request], count, max(500, 4 * count))) for _ in range(3)]
                rates.append(f"{statistics.median(rate for rate, _ in runs):.0f}")
                seconds.append(float(np.percentile([taken for _, latencies in runs for taken in latencies], 99)))
                resident.append(f"{Footprint.of(server.process.pid).resident_bytes / MIB:.0f}")
    others = [("images/s", rates), ("service's memory, MiB", resident)]
    yield Curve("clients", "clients at once", CLIENTS, "p99", seconds, others)


def objects(rounds: int, cache: Path) -> Iterator[Curve]:
    """Threshold, NMS and JSON, when a picture has so many objects with 9 candidates for each."""
    detector = Detector(PRETRAINED, device="cpu")
    names = {label.class_id: label.label for label in detector.metadata.labels}
    model = LoadedModel(detector, names, {name: label for label, name in names.items()}, 1, detector.metadata.name)
    canvas = CanvasImage(np.zeros((800, 1088, 3), np.uint8), (800, 1066), (960, 1280))
    options = Options(score_threshold=0.05, nms_threshold=0.5, max_detections=300)

    def whole(found: Candidates) -> bytes:
        detections = postprocess(found, canvas, options)
        return to_json(answer(Detected(detections, canvas.original_size, model, Stopwatch()), "2f1d7e0c"))

    pictures = [objects_apart(count, min(names)) for count in OBJECTS]
    found = [str(len(postprocess(each, canvas, options))) for each in pictures]
    seconds = interleaved(rounds * 10, *(lambda each=each: whole(each) for each in pictures))  # type: ignore[misc]
    yield Curve("objects", "objects in the picture", OBJECTS, "NMS and JSON", seconds, [("boxes in the answer", found)])


def objects_apart(count: int, label: int) -> Candidates:
    """5,000 candidates of which nine lie on each object; objects do not touch each other."""
    boxes, scores = np.zeros((5000, 4), np.float32), np.full(5000, -1, np.float32)
    for index in range(count * 9):
        which, copy = divmod(index, 9)
        corner = np.array([which % 20, which // 20], np.float32) * 50 + copy * 0.5
        boxes[index] = [*corner, *(corner + 40)]
        scores[index] = 0.9 - 0.05 * copy
    return Candidates(boxes, scores, np.full(5000, label, np.int64))


SECTIONS: tuple[Callable[[int, Path], Iterator[Curve]], ...] = (pictures, canvases, classes, clients, objects)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [section.__name__ for section in SECTIONS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="sections to run [all]")
    parser.add_argument("--rounds", type=int, default=9, help="of each measurement, in turns [9]")
    parser.add_argument("--plots", type=Path, default=PLOTS, help="folder of the plots [docs/figures/scale]")
    add_cache_flag(parser)
    given = parser.parse_args()
    print(f"{machine()}; {command('tests.benchmarks.scale')}")
    for section in SECTIONS:
        if section.__name__ in given.only:
            for curve in section(given.rounds, given.cache):
                print(f"\n{curve.table()}\n\nPlot: {curve.plot(given.plots)}", flush=True)


if __name__ == "__main__":
    main()
