"""Tiles through the service: the answer is the detector's own, and neither load nor neighbours change it."""

import asyncio
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

from model.detector import Detector
from model.image import decode_image
from model.tiles import Tiling, whole, windows
from model.types import Candidates
from service.core.cutting import TooManyWindows, begin_cutting, check_windows, cut
from service.core.engine import Engine
from service.core.job import Job, Options, Stopwatch
from service.core.memory import Budget, HeldBytes
from service.metrics import Metrics
from tests.support.pictures import encode
from tests.support.pictures import picture as pixels
from tests.support.serving import FakeDetector, Serving, assert_problem, picture, serving
from tests.support.tiny_model import write_tiny_model

NOTHING = Candidates(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    path = tmp_path_factory.mktemp("tiles") / "tiny.onnx"
    write_tiny_model(path)
    with serving(Detector(path, device="cpu", runs_at_once=2), runs_at_once=2, max_tiles=40) as server:
        yield server


def turned(kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x112] = 6
    return encode(pixels(200, 330), kind, exif=exif)


def boxes(answer: dict[str, object]) -> list[list[float]]:
    return [[*each["box"].values(), each["score"], each["class_id"]] for each in answer["detections"]]  # type: ignore[index,attr-defined]


def expected(server: Serving, image: bytes, tiling: Tiling, **options: float) -> list[list[float]]:
    assert isinstance(server.detector, Detector)
    found = server.detector.detect(decode_image(image), tiling=tiling, **options)  # type: ignore[arg-type]
    return np.column_stack([found.boxes, found.scores, found.labels]).tolist()


@pytest.mark.parametrize(
    "image", [encode(pixels(200, 330), "JPEG"), encode(pixels(330, 90), "PNG"), turned("JPEG"), turned("TIFF")]
)
@pytest.mark.parametrize(("tile", "overlap"), [(64, 0.1), (120, 0.5), (250, None), (400, None)])
def test_the_answer_is_the_detector_s_own(tiny: Serving, image: bytes, tile: int, overlap: float | None) -> None:
    query = {"tile": tile} | ({} if overlap is None else {"overlap": overlap})
    answer = tiny.client.post("/detect", params=query, content=image)
    assert answer.status_code == 200, answer.text
    tiling = Tiling(tile, 0.2 if overlap is None else overlap)
    np.testing.assert_allclose(boxes(answer.json()), expected(tiny, image, tiling), atol=1e-3)
    timing = answer.json()["timing_ms"]
    assert sum(timing.values()) - timing["total"] == pytest.approx(timing["total"], abs=0.01)


def test_options_and_batches_and_drawings_take_tiles_too(tiny: Serving) -> None:
    image = encode(pixels(200, 330), "JPEG")
    query = {"tile": 120, "score_threshold": 0.2, "nms_threshold": 0.3, "max_detections": 7}
    want = expected(tiny, image, Tiling(120), score_threshold=0.2, nms_threshold=0.3, max_detections=7)
    assert len(want) == 7
    answer = tiny.client.post("/detect/batch", params=query, files=[("image", image)] * 3)
    for each in answer.json()["results"]:
        np.testing.assert_allclose(boxes(each), want, atol=1e-3)
    every = tiny.client.post("/detect?tile=120", content=image).json()["detections"]
    names = {each["label"] for each in every}
    assert len(names) > 1
    for name in names:
        chosen = tiny.client.post("/detect", params={"tile": 120, "label": name}, content=image).json()["detections"]
        assert chosen == [each for each in every if each["label"] == name]
    drawn = tiny.client.post("/detect", params=query, content=image, headers={"Accept": "image/png"})
    with Image.open(io.BytesIO(drawn.content)) as drawing:
        assert drawing.size == (330, 200)


def test_load_and_neighbours_do_not_change_it(tiny: Serving) -> None:
    images = [encode(pixels(150 + 10 * seed, 230, seed), "JPEG") for seed in range(4)]
    alone = [tiny.client.post("/detect?tile=100", content=image).json()["detections"] for image in images]

    def ask(number: int) -> list[object]:
        answer = tiny.client.post("/detect?tile=100", content=images[number % 4])
        return list(answer.json()["detections"])

    with ThreadPoolExecutor(8) as pool:
        for number, answer in enumerate(pool.map(ask, range(16))):
            assert answer == alone[number % 4]


@pytest.mark.parametrize(
    "query", ["overlap=0.5", "tile=63", "tile=4097", "tile=64&overlap=0.91", "tile=64&overlap=nan", "tile=a"]
)
def test_tiles_that_cannot_be_are_invalid_parameters(tiny: Serving, query: str) -> None:
    assert_problem(tiny.client.post(f"/detect?{query}", content=picture()), 422, "invalid_parameter")


def test_too_many_windows_are_refused_with_the_smallest_tile_that_fits(tiny: Serving) -> None:
    image, small = encode(pixels(600, 900), "PNG"), encode(pixels(90, 120), "PNG")
    detail = assert_problem(tiny.client.post("/detect?tile=64", content=image), 422, "invalid_parameter").detail
    smallest = int(detail.rpartition(" ")[2])
    assert tiny.client.post(f"/detect?tile={smallest}", content=image).status_code == 200
    assert tiny.client.post(f"/detect?tile={smallest - 1}", content=image).status_code == 422
    answer = tiny.client.post("/detect/batch?tile=64", files=[("image", image), ("image", small)])
    [refused, answered] = answer.json()["results"]
    assert refused["code"] == "invalid_parameter" and "detections" in answered
    with pytest.raises(TooManyWindows, match="no tile up to 4096 has so few"):
        check_windows((1, 50_000_000), Tiling(4096), 256)


def test_what_the_file_does_not_claim_is_counted_when_it_is_decoded(tiny: Serving) -> None:
    """A TIFF of two directories: which is the picture the reader decides."""
    file = io.BytesIO()
    first, second = (Image.fromarray(pixels(600, 900, seed)) for seed in (0, 1))
    first.save(file, "TIFF", save_all=True, append_images=[second])
    detail = assert_problem(
        tiny.client.post("/detect?tile=64", content=file.getvalue()), 422, "invalid_parameter"
    ).detail
    assert "900 × 600" in detail and "at most 40" in detail


def test_a_tiled_picture_is_one_image_in_one_place_and_many_canvases() -> None:
    with serving(detector := FakeDetector(), max_tiles=40, queue_capacity=2) as server, ThreadPoolExecutor(1) as pool:
        detector.gate.clear()
        answer = pool.submit(server.client.post, "/detect?tile=64", content=picture(200, 200))
        server.wait_until(lambda: server.metric("retinaserve_requests_running") == 1)
        assert server.metric("retinaserve_queue_depth") == 1
        [job] = server.service.engine.line._jobs
        assert job.canvases_left == 1 + 16
        detector.gate.set()
        assert answer.result().status_code == 200
        assert sum(detector.batches) == 17
        server.wait_until(lambda: server.metric("retinaserve_images_total") == 1)
        assert server.metric("retinaserve_batch_size_sum") == 17


def test_windows_are_planned_by_the_claim_and_the_picture_is_let_go_with_the_last(tiny: Serving) -> None:
    service = tiny.service
    engine = Engine(
        service.store, service.engine.decoders, Metrics(), queue_capacity=1, max_batch_delay_seconds=0,
        runs_at_once=1, decode_threads=1, max_image_pixels=10**6, max_tiles=40, budget=Budget.of(1),
        bodies=HeldBytes(10**9), answers=HeldBytes(10**9),
    )  # fmt: skip

    async def submit() -> Job:
        options = Options(0.05, 0.5, 300, tiling=Tiling(64))
        [job] = engine.submit(
            [bytearray(picture(200, 200))], service.store.serving(), options, lambda *_: None, timeout_seconds=9,
            watch=Stopwatch(),
        )  # fmt: skip
        return job

    job = asyncio.run(submit())
    assert job.canvases_left == 17
    begin_cutting(job, Tiling(64), pixels(200, 200), 16)
    shown = []
    while job.uncut:
        assert job.picture is not None
        parts = cut(job)
        assert len(parts) <= 2
        shown += [part.window for part in parts]
        for part in parts:
            part.candidates = NOTHING
    assert job.picture is None
    assert shown == [whole(200, 200), *windows(200, 200, Tiling(64))]


def test_others_are_served_between_the_windows_and_its_picture_is_let_go() -> None:
    with serving(detector := FakeDetector(), max_tiles=100) as server, ThreadPoolExecutor(2) as pool:
        runs = threading.Semaphore(0)
        detector.fault = lambda canvases: runs.acquire()  # type: ignore[assignment,return-value]
        tiled = pool.submit(server.client.post, "/detect?tile=64", content=picture(400, 400))
        runs.release()
        server.wait_until(lambda: len(detector.batches) >= 2)
        other = pool.submit(server.client.post, "/detect", content=picture())
        server.wait_until(lambda: server.metric("retinaserve_queue_depth") == 2)
        for _ in range(4):
            runs.release()
        assert other.result().status_code == 200
        assert not tiled.done()
        for _ in range(100):
            runs.release()
        assert tiled.result().status_code == 200
        assert not server.service.engine.line._waiting.cut


def test_who_is_cancelled_in_the_middle_leaves_nothing_behind() -> None:
    with serving(detector := FakeDetector(seconds=0.02), max_tiles=300) as server:
        with pytest.raises(httpx.ReadTimeout):
            server.client.post("/detect?tile=64", content=picture(800, 800), timeout=0.3)
        server.wait_until(lambda: server.metric("retinaserve_queue_depth") == 0)
        server.wait_until(lambda: not server.service.engine.line._waiting.cut)
        assert sum(detector.batches) < 100
        assert server.client.post("/detect", content=picture()).status_code == 200


def test_a_failing_window_fails_its_picture_alone() -> None:
    def fault(canvases: object) -> None:
        if len(detector.batches) == 5:
            raise ValueError("made to fail")

    with serving(detector := FakeDetector(), max_tiles=40) as server:
        detector.fault = fault
        answer = server.client.post("/detect?tile=64", content=picture(200, 200))
        assert answer.status_code == 500
        detector.fault = lambda canvases: None
        assert server.client.post("/detect?tile=64", content=picture(200, 200)).status_code == 200
        assert not server.service.engine.line._waiting.cut
