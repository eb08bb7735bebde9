"""A ResNet-50 RetinaNet on a CPU: the service compared with the bare session, torchvision, OpenVINO and int8.

    python -m tests.benchmarks.cpu [--only SECTION ...] [--rounds N] [--pictures N] [--demo-int8 FILE.onnx ...]

torchvision's v2 layout, 91 classes, random weights that detect, shorter side 800. Sections: service (POST /detect over
the bare session, torchvision end to end), throughput, int8, openvino, postprocess, start, memory. Prints one markdown
table; nothing else should run on the machine. At 3 s an inference, all sections take about 12 minutes. The models are
made once, in the cache folder.
"""

import argparse
import asyncio
import functools
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from pydantic_core import to_json

from model.detector import Detector, available_cores
from model.pretrained import PRETRAINED
from model.types import CanvasImage
from service.api.schemas import answer
from service.core import engine
from service.core.job import Detected, Options, Stopwatch
from service.core.store import LoadedModel
from tests.benchmarks.compare import closed_loop, raw
from tests.benchmarks.measuring import (
    InstallFailed,
    add_cache_flag,
    bare_session,
    candidates,
    command,
    environment,
    interleaved,
    machine,
    mixed_photos,
    model_inputs,
    photo,
    post,
    resnet50,
    start_to_ready,
    table,
)
from tests.support.load import Footprint
from tests.support.serving import ServerProcess, server_process

OPENVINO = ("openvino==2026.4.1", "numpy==2.4.6")
CLIENTS = 8
CALIBRATED = 8
"""Pictures to take int8's ranges from: enough for its speed, of which this speaks; AP is `evaluate`'s."""


@dataclass(frozen=True)
class Row:
    measured: str
    result: str
    reach: str = ""


@dataclass(frozen=True)
class Setting:
    """The arguments of every section."""

    cache: Path
    rounds: int
    pictures: int
    demo_int8: Sequence[Path]

    @functools.cached_property
    def model(self) -> Path:
        return resnet50(self.cache)

    @functools.cached_property
    def resize(self) -> Any:
        return Detector(self.model, device="cpu").metadata.resize

    def inputs(self, data: bytes) -> dict[str, Any]:
        return model_inputs(data, self.resize)

    def photos(self) -> list[bytes]:
        return mixed_photos(self.pictures)


@contextmanager
def served(model: Path, *flags: str) -> Iterator[tuple[ServerProcess, httpx.Client]]:
    patient = ("--request-timeout-seconds", "600", *flags)
    with (
        tempfile.TemporaryDirectory() as folder,
        server_process(Path(folder), *patient, model_path=model) as server,
        httpx.Client(base_url=server.url, timeout=600) as client,
    ):
        yield server, client


def service(setting: Setting) -> list[Row]:
    """The service, the bare session and torchvision in turns: one picture again and again, then mixed ones."""
    data = photo(1280, 960)
    session, eager = bare_session(setting.model), torchvision_eager(setting.cache / "resnet50.pt")
    with served(setting.model) as (_, client):
        inputs = setting.inputs(data)
        posted, ran = interleaved(setting.rounds, lambda: post(client, data), lambda: session.run(None, inputs))
        seconds: list[list[float]] = [[], [], []]
        for each in setting.photos():
            inputs = setting.inputs(each)
            actions = (lambda: post(client, each), lambda: session.run(None, inputs), lambda: eager(each))  # noqa: B023
            for taken, action in zip(seconds, actions, strict=True):
                started = time.perf_counter()
                action()
                taken.append(time.perf_counter() - started)
    posts, runs, eagers = (np.array(taken) for taken in seconds)
    return [
        Row(
            f"p50 of `POST /detect`, 1280×960 JPEG in, JSON out, over the bare session ({ran:.2f} s)",
            f"{posted / ran:.3f}", "≤ 1.03",
        ),
        Row(
            f"the same for {len(posts)} mixed pictures: median of the ratios, worst",
            f"{np.median(posts / runs):.3f}, {(posts / runs).max():.3f}",
        ),
        Row(
            f"that service, end to end, as fast as torchvision eager, end to end ({np.median(eagers):.2f} s): "
            "sum over the mixed pictures",
            f"{eagers.sum() / posts.sum():.2f} ×", "≥ 1.7 ×",
        ),
    ]  # fmt: skip


def torchvision_eager(checkpoint: Path, layout: str = "_v2") -> Callable[[bytes], object]:
    """Bytes to detections as torchvision's own code has it: decode, transform, network, NMS; the same weights.

    `layout`: the end of torchvision's name, empty for v1.
    """
    import torch
    import torchvision

    from training.checkpoint import load_checkpoint

    torch.set_num_threads(available_cores())
    network = getattr(torchvision.models.detection, f"retinanet_resnet50_fpn{layout}")(
        weights=None, weights_backbone=None, num_classes=91, detections_per_img=300
    )
    network.load_state_dict(dict(load_checkpoint(checkpoint).model), strict=True)
    network.eval()

    def detect(data: bytes) -> object:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels = torchvision.io.decode_jpeg(encoded, mode=torchvision.io.ImageReadMode.RGB)
        with torch.inference_mode():
            return network([pixels / 255])

    return detect


def throughput(setting: Setting) -> list[Row]:
    """The bare loop over half of the pictures, the service with 8 clients over all, the bare loop over the rest."""
    photos = setting.photos()
    inputs = [setting.inputs(data) for data in photos]
    session = bare_session(setting.model)

    def loop(part: Sequence[dict[str, Any]]) -> float:
        started = time.perf_counter()
        for each in part:
            session.run(None, each)
        return time.perf_counter() - started

    half = len(photos) // 2
    with served(setting.model) as (server, client):
        post(client, photos[0])
        loop(inputs[:1])
        first = loop(inputs[:half])
        rate, _ = asyncio.run(closed_loop(server.url, [raw(data) for data in photos], CLIENTS, len(photos)))
        bare_rate = len(photos) / (first + loop(inputs[half:]))
    reach = "≥ 0.98"
    return [
        Row(
            f"throughput with {CLIENTS} clients, over the bare loop's ({bare_rate:.3f}/s)",
            f"{rate / bare_rate:.3f}",
            reach,
        )
    ]


def int8(setting: Setting) -> list[Row]:
    """Sessions of fp32 and int8 files in turns."""
    from training.checkpoint import load_checkpoint
    from training.exchange.int8 import FP32_LAYERS

    rows, model = [], setting.model  # makes the checkpoint beside it, too
    checkpoint = load_checkpoint(setting.cache / "resnet50.pt")
    files = {layers: setting.cache / f"resnet50-int8-fp32-{layers}.onnx" for layers in FP32_LAYERS}
    for layers, file in files.items():
        if not file.exists():
            quantised(setting, checkpoint, file, layers)
    inputs = setting.inputs(photo(1280, 960))
    full, all_layers, boxes, outputs = compare_sessions([model, *files.values()], inputs, setting.rounds)
    rows.append(
        Row(f"int8, all layers: as fast as fp32 ({full:.2f} s)", f"{full / all_layers:.2f} ×", "≥ 3.2 ×, with VNNI")
    )
    rows.append(Row("int8, box layer in fp32 (the default)", f"{full / boxes:.2f} ×", "≥ 2.4 ×, with VNNI"))
    rows.append(Row("int8, class and box layers in fp32", f"{full / outputs:.2f} ×"))
    if setting.demo_int8:
        resize = Detector(PRETRAINED, device="cpu").metadata.resize
        seconds = compare_sessions([PRETRAINED, *setting.demo_int8], model_inputs(photo(1280, 960), resize), 20)
        for file, taken in zip(setting.demo_int8, seconds[1:], strict=True):
            rows.append(
                Row(f"the demo model, {file.name} over fp32 ({seconds[0]:.3f} s)", f"{seconds[0] / taken:.2f} ×")
            )
    flags = " ".join(flag for flag in int8_flags() if flag) or "none"
    return [*rows, Row("this CPU's flags for int8 products", flags)]


def int8_flags() -> list[str]:
    words = Path("/proc/cpuinfo").read_text().split()
    return [flag for flag in ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm") if flag in words]


def quantised(setting: Setting, checkpoint: Any, file: Path, fp32_layers: Any) -> None:
    """An int8 file of the ResNet-50, calibrated on the mixed pictures."""
    import onnx

    from training.exchange.int8 import quantise
    from training.exchange.onnx_file import describe

    canvases = (
        CanvasImage(each["images"][0], tuple(each["sizes"][0]), (1, 1))
        for each in map(setting.inputs, mixed_photos(CALIBRATED))
    )
    model = quantise(onnx.load(setting.model), canvases, fp32_layers=fp32_layers)
    onnx.helper.set_model_props(model, describe(checkpoint, file.stem, "int8").to_props())
    temporary = file.with_suffix(f".{uuid.uuid4().hex}")
    temporary.write_bytes(model.SerializeToString())
    temporary.replace(file)


def compare_sessions(files: Sequence[Path], inputs: dict[str, Any], rounds: int) -> list[float]:
    sessions = [bare_session(file) for file in files]
    return interleaved(rounds, *(functools.partial(session.run, None, inputs) for session in sessions))


def openvino(setting: Setting) -> list[Row]:
    """OpenVINO in its own process and environment, in turns with our session."""
    name = "OpenVINO f32 on the same file: our session is as fast"
    inputs = setting.inputs(photo(1280, 960))
    session = Detector(setting.model, device="cpu")
    canvas = CanvasImage(inputs["images"][0], tuple(inputs["sizes"][0]), (960, 1280))
    try:
        python = environment(setting.cache, "openvino", OPENVINO)
    except InstallFailed as error:
        return [Row(name, f"not run: {error}", "≥ 0.97 ×")]
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "inputs.npz", **inputs)
        script = Path(__file__).parent / "peers" / "openvino_session.py"
        arguments = [python, script, setting.model, Path(folder) / "inputs.npz", str(available_cores())]
        with subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as child:
            assert child.stdin and child.stdout and child.stderr
            if child.stdout.readline().strip() != "ready":
                reason = child.stderr.read().strip().splitlines()[-1:]
                return [Row(name, f"not run: {' '.join(reason)}", "≥ 0.97 ×")]
            theirs: list[float] = []

            def infer() -> None:
                child.stdin.write("\n")  # type: ignore[union-attr]
                child.stdin.flush()  # type: ignore[union-attr]
                theirs.append(float(child.stdout.readline()))  # type: ignore[union-attr]

            [ours, _] = interleaved(setting.rounds, lambda: session.run([canvas]), infer)
            child.stdin.close()
    seconds = statistics.median(theirs[1:])
    return [Row(f"{name} as {OPENVINO[0]} ({seconds:.2f} s)", f"{seconds / ours:.3f} ×", "≥ 0.97 ×")]


def postprocess(setting: Setting) -> list[Row]:
    """From 5,000 candidates to the bytes of an answer with 300 boxes."""
    canvas = CanvasImage(np.zeros((800, 1088, 3), np.uint8), (800, 1066), (960, 1280))
    detector = Detector(PRETRAINED, device="cpu")
    ids = [label.class_id for label in detector.metadata.labels]
    found = candidates(5000, 1700, classes=len(ids), objects=400)
    found.labels[:] = np.array(ids)[found.labels]
    names = {label.class_id: label.label for label in detector.metadata.labels}
    model = LoadedModel(detector, names, {name: label for label, name in names.items()}, 1, detector.metadata.name)
    options = Options(score_threshold=0.05, nms_threshold=0.5, max_detections=300)
    kept = engine.postprocess(found, canvas, options)
    assert len(kept) == 300, f"only {len(kept)} boxes: nothing is shown"

    def whole() -> bytes:
        detections = engine.postprocess(found, canvas, options)
        return to_json(
            answer(Detected(detections, (960, 1280), model, Stopwatch()), "2f1d7e0c6a5b4c3d8e9f0a1b2c3d4e5f")
        )

    [seconds, nms] = interleaved(100, whole, lambda: engine.postprocess(found, canvas, options))
    return [
        Row(
            f"threshold, NMS (these two {nms * 1e3:.2f} ms) and JSON of 300 boxes, 1,700 of 5,000 candidates pass",
            f"{seconds * 1e3:.2f} ms", "≤ 1 ms",
        )
    ]  # fmt: skip


def start(setting: Setting) -> list[Row]:
    demo, large = (statistics.median(start_to_ready(model) for _ in range(3)) for model in (PRETRAINED, setting.model))
    return [
        Row("start of the process to ready, demo model", f"{demo:.1f} s", "≤ 3 s"),
        Row("start of the process to ready, ResNet-50", f"{large:.1f} s", "≤ 6 s"),
    ]


def memory(setting: Setting) -> list[Row]:
    """Both after the same pictures, the service after some of them came at once."""
    photos = [photo(1280, 960), *setting.photos()[:4]]
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, data in enumerate(photos):
            files.append(Path(folder) / f"{number}.npz")
            np.savez(files[-1], **setting.inputs(data))
        script = Path(__file__).parent / "session_memory.py"
        arguments = [sys.executable, script, setting.model, str(available_cores()), *files]
        bare = int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
    with served(setting.model) as (server, client):
        for data in photos:
            post(client, data)
        asyncio.run(closed_loop(server.url, [raw(data) for data in photos], CLIENTS, CLIENTS))
        ours = Footprint.of(server.process.pid).resident_bytes
    mib = 1024**2
    return [
        Row(
            f"memory of the service ({ours / mib:.0f} MiB) over the bare session's ({bare / mib:.0f} MiB)",
            f"{ours / bare:.2f}", "≤ 1.15",
        )
    ]  # fmt: skip


SECTIONS: tuple[Callable[[Setting], list[Row]], ...] = (
    service, throughput, int8, openvino, postprocess, start, memory,
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [section.__name__ for section in SECTIONS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="sections to run [all]")
    parser.add_argument("--rounds", type=int, default=9, help="of what is repeated, in turns [9]")
    parser.add_argument("--pictures", type=int, default=20, help="of mixed size [20]")
    parser.add_argument(
        "--demo-int8", type=Path, nargs="+", default=(), help="int8 files to time beside the demo model"
    )
    add_cache_flag(parser)
    given = parser.parse_args()
    setting = Setting(given.cache, given.rounds, given.pictures, given.demo_int8)
    rows, failures = list[Row](), 0
    for section in SECTIONS:
        if section.__name__ in given.only:
            started = time.perf_counter()
            try:
                rows += section(setting)
            except Exception as error:  # the others' minutes shall not be lost
                traceback.print_exc()
                rows.append(Row(section.__name__, f"failed: {error!r}"))
                failures += 1
            print(f"{section.__name__}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    print(f"{machine()}; {command('tests.benchmarks.cpu')}\n")
    print(table(("measured", "result", "reach"), [(row.measured, row.result, row.reach) for row in rows]))
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
