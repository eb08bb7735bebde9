"""The sections `agree` and `agree_random`: whether what is detected on the GPU is what the CPU detects.

Each file is asked in a process of its own, by `Detector.detect` on several pictures, as a batch and one by one, and
through a running service. A detection agrees if the other side has one of its label within both tolerances.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.pretrained import PRETRAINED
from model.runtime.cuda_session import InputShape
from model.types import Detections
from tests.benchmarks.gpu.answers import BATCH, from_arrays
from tests.benchmarks.gpu.plan import Plan
from tests.benchmarks.gpu.report import Report, significant, timed
from tests.benchmarks.gpu.session import Bound
from tests.support.load import Scrape
from tests.support.serving import server_process, wait_until
from training.demo.draw import draw_picture

READY_SECONDS = 150
"""Sessions for each of the common canvases and batch sizes are opened before."""
PATIENCE_SECONDS = 100


@dataclass(frozen=True)
class Tolerance:
    score: float
    box: float
    """Pixels of the picture."""


EXACT = Tolerance(1e-3, 0.05)
SHORT = Tolerance(2e-2, 4.0)
"""For 10 bits of mantissa, as TF32 and fp16 have."""
WITHOUT_TF32 = {"NVIDIA_TF32_OVERRIDE": "0"}
HEAD = ("what", "against", "pictures", "detections", "without counterpart", "largest score difference",
        "largest box difference, px", "tolerated", "verdict")  # fmt: skip


def agree(plan: Plan, report: Report) -> None:
    """The demo model: its weights are trained, its pictures are of its kind."""
    half = plan.models / "shapes-fp16.onnx"
    if not half.exists():
        export_half_shapes(half)
    with TemporaryDirectory() as folder:
        pictures = write_pictures(Path(folder))
        expected = _compare_files(plan, report, pictures, PRETRAINED, half)
        _compare_service(plan, report, pictures, PRETRAINED, expected)


def agree_random(plan: Plan, report: Report) -> None:
    with TemporaryDirectory() as folder:
        pictures = write_pictures(Path(folder), others=1)
        _compare_files(plan, report, pictures, plan.model_file("fp32"), plan.model_file("fp16"))


def export_half_shapes(out: Path) -> None:
    from training.checkpoint import load_checkpoint
    from training.exchange.onnx_file import export

    export(load_checkpoint(PRETRAINED.with_suffix(".pt")), out, name="shapes", precision="fp16")


def write_pictures(folder: Path, others: int = 4) -> Path:
    """A batch's worth of one size, first by name, and some of others."""
    drawn = [draw_picture(7, "val", index).pixels for index in range(40)]
    size = max({pixels.shape for pixels in drawn}, key=[pixels.shape for pixels in drawn].count)
    same, other = ([pixels for pixels in drawn if (pixels.shape == size) == wanted] for wanted in (True, False))
    for number, pixels in enumerate([*same[:BATCH], *other[:others]]):
        Image.fromarray(pixels).save(folder / f"{number:02}.jpg", quality=92)
    return folder


def _compare_files(plan: Plan, report: Report, pictures: Path, full: Path, half: Path) -> list[Detections]:
    """Answers what the CPU detects."""
    alone = list(from_arrays("alone", _answers(full, "cpu", pictures)))
    report.table(*HEAD)
    for file, arithmetic, environment, tolerance in (
        (full, "fp32 without TF32", WITHOUT_TF32, EXACT),
        (full, "fp32 with TF32", {}, SHORT),
        (half, "fp16", {}, SHORT),
    ):
        try:
            found = _answers(file, plan.device, pictures, environment)
        except subprocess.SubprocessError as error:
            report.add(f"{file.name}, {arithmetic}", "the CPU", f"failed: {error}")
            continue
        what = f"{file.name}, {arithmetic}, {found['provider']}"
        _add(report, what, f"{full.name} on the CPU", alone, from_arrays("alone", found), tolerance)
        batch, single = from_arrays("batch", found), from_arrays("single", found)
        if plan.device == "cuda":
            _add(report, f"{what}: a batch of {found['batch']}", "the same one by one", list(single), batch, tolerance)
    for file in (full, half):
        nodes = Bound(file.read_bytes(), plan, InputShape(1, *plan.canvases[0])).nodes()
        report.note(f"{file.name}: {', '.join(f'{number} nodes by {name}' for name, number in nodes.items())}")
    return alone


def _answers(file: Path, device: str, pictures: Path, environment: dict[str, str] | None = None) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        out = Path(folder) / "answers.npz"
        command = [sys.executable, "-m", "tests.benchmarks.gpu.answers", str(file), device, str(pictures), str(out)]
        subprocess.run(command, env=os.environ | (environment or {}), check=True, timeout=PATIENCE_SECONDS)
        return dict(np.load(out))


def _compare_service(plan: Plan, report: Report, pictures: Path, file: Path, expected: Sequence[Detections]) -> None:
    """POST /detect on the GPU against Detector.detect on the CPU."""
    flags = ["--device", plan.device, "--max-batch-size", "2"]
    with (
        TemporaryDirectory() as folder,
        server_process(Path(folder), *flags, model_path=file, ready=False) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        _, seconds = timed(lambda: wait_until(lambda: client.get("/readyz").status_code == 200, READY_SECONDS))
        found = [_posted(client, path) for path in sorted(pictures.glob("*.jpg"))]
        card = client.get("/model").json()
        _add(report, f"POST /detect, {file.name}, {card['provider']}", "Detector on the CPU", expected, found, SHORT)
        report.note(f"ready {seconds:.1f} s after it listened; /model: device {card['device_requested']}, "
                    f"provider {card['provider']}, fell_back {card['fell_back']}")  # fmt: skip
        samples = {name: value for (name, _), value in Scrape(server.url).samples.items() if "_gpu_" in name}
        report.note(f"GPU metrics: {json.dumps(samples) if samples else 'none'}")


def _posted(client: httpx.Client, path: Path) -> Detections:
    answer = client.post("/detect", content=path.read_bytes(), headers={"Content-Type": "image/jpeg"})
    found = answer.raise_for_status().json()["detections"]
    boxes = [[each["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")] for each in found]
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array([each["score"] for each in found], np.float32),
        np.array([each["class_id"] for each in found], np.int64),
    )


def _add(
    report: Report,
    what: str,
    against: str,
    expected: Sequence[Detections],
    found: Iterable[Detections],
    tolerance: Tolerance,
) -> None:
    pairs = list(zip(expected, found, strict=True))
    both = [matched(*pair, tolerance) for a, b in pairs for pair in ((a, b), (b, a))]
    distances = np.concatenate(both) if both else np.zeros((0, 2))
    agrees: NDArray[np.bool_] = np.all(distances <= [tolerance.score, tolerance.box], axis=1)
    worst = distances[agrees].max(axis=0, initial=0)
    if not agrees.all():
        lost = distances[~agrees & np.isfinite(distances).all(axis=1)]
        nearest = lost[:4].round(4).tolist()
        report.note(f"{what}: of those without counterpart, the nearest of their label are {nearest} "
                    "away in score and pixels")  # fmt: skip
    verdict = "agrees" if len(agrees) and agrees.mean() >= 0.99 else "DIFFERS"
    report.add(what, against, len(pairs), len(agrees), int((~agrees).sum()), significant(worst[0], 2),
               significant(worst[1], 2), f"{tolerance.score}, {tolerance.box} px", verdict)  # fmt: skip


def matched(wanted: Detections, found: Detections, tolerance: Tolerance, from_score: float = 0.05) -> Any:
    """[wanted, 2]: how far in score and box the nearest of the label is; infinite where there is none.

    Those that score near the threshold are left out: the other side may have dropped them.
    """
    sure = wanted.scores >= from_score + tolerance.score
    boxes = np.abs(wanted.boxes[sure, None] - found.boxes).max(axis=-1, initial=0)
    scores = np.abs(wanted.scores[sure, None] - found.scores)
    other_label = wanted.labels[sure, None] != found.labels
    far = np.where(other_label, np.inf, np.maximum(boxes / tolerance.box, scores / tolerance.score))
    if not far.shape[1]:
        return np.full((len(far), 2), np.inf)
    nearest = far.argmin(axis=1)
    rows = np.arange(len(far))
    distances = np.stack([scores[rows, nearest], boxes[rows, nearest]], axis=1)
    distances[np.isinf(far[rows, nearest])] = np.inf
    return distances
