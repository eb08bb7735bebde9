"""The CUDA path on ONNX Runtime's real provider and the fake libraries: run by `make test-foreign`, in .venv-cuda."""

import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model.detector import Detector, InferenceFailed
from model.metadata import ResizePolicy
from model.runtime.cuda import CudaRuntime
from model.runtime.cuda_device import BUDGET_SHARE, CudaDevice, first_gpu
from model.runtime.cuda_session import CudaOptions, InputShape, open_on_cuda
from model.runtime.session import CPU, CUDA, has_cuda_build, operators_on
from model.types import CanvasImage
from tests.foreign.cuda.fake import Call, FakeCuda

MODEL = Path(__file__).parents[3] / "model" / "pretrained" / "shapes.onnx"
CARD_BYTES = 300 * 2**20
BYTES_PER_PIXEL = 60
"""Activations of the demo model, whose pyramid is narrower than those that the product's estimate is for."""
ALLOCATIONS = {"malloc", "free", "host_alloc"}
COPIES = {"copy_up", "copy_down"}

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build the fake CUDA libraries with"),
    pytest.mark.skipif(not has_cuda_build(), reason="this ONNX Runtime is built without CUDA: run `make test-foreign`"),
]


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCuda]:
    fake = FakeCuda(tmp_path_factory.mktemp("fake"))
    with fake.capacity(CARD_BYTES):
        first_gpu(None)
        yield fake


def runtime(bytes_per_pixel: int = BYTES_PER_PIXEL) -> CudaRuntime:
    """The demo model on the process's device, whose budget believes this of it.

    Its answers are whatever lay in their memory, NaN too, which a Detector would refuse.
    """
    model, device = MODEL.read_bytes(), first_gpu(None)
    return CudaRuntime(
        lambda shape: open_on_cuda(model, shape, device.limit_bytes, device.options),
        device,
        ResizePolicy(),
        weight_bytes=2 * len(model),
        bytes_per_pixel=bytes_per_pixel,
    )


def canvases(count: int, height: int = 320, width: int = 416) -> Sequence[CanvasImage]:
    return [CanvasImage.uniform((height, width))] * count


def count_of(calls: Sequence[Call], what: str) -> int:
    return sum(call.what == what for call in calls)


# Placement and options


def test_fp32_says_that_it_is_tf32_and_int8_that_cuda_is_the_wrong_place(
    cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    detector = Detector(MODEL, device="cuda")
    assert (detector.provider, detector.fell_back, detector.tf32) == (CUDA, False, True)
    assert "computes its fp32 convolutions in TF32" in caplog.text
    int8 = Detector(MODEL.with_stem("shapes-int8"), device="cuda")
    assert (int8.provider, int8.tf32) == (CUDA, False)
    assert "is int8, for which CUDA has no kernels" in caplog.text


def test_a_file_that_is_made_for_cpus_is_told_to_be_slow(
    cuda: FakeCuda, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key, value = b"retinaserve.made_for", b"cpu"
    entry = b"\n" + bytes([len(key)]) + key + b"\x12" + bytes([len(value)]) + value  # metadata_props are field 14
    (tmp_path / "a.onnx").write_bytes(MODEL.read_bytes() + bytes([14 << 3 | 2, len(entry)]) + entry)
    Detector(tmp_path / "a.onnx", device="cuda")
    assert "is made for CPUs and slow on CUDA" in caplog.text


@pytest.mark.parametrize("shape", [InputShape(1, 800, 1088), InputShape(8, 1344, 768), InputShape(2, 32, 32)])
@pytest.mark.parametrize("prefer_nhwc", [False, True])
def test_every_node_is_on_cuda_and_none_on_the_cpu(cuda: FakeCuda, shape: InputShape, prefer_nhwc: bool) -> None:
    session = open_on_cuda(MODEL.read_bytes(), shape, CARD_BYTES, CudaOptions(prefer_nhwc=prefer_nhwc))
    assert session.get_providers()[0] == CUDA
    assert {"Conv", "Resize", "TopK", "GatherElements"} <= operators_on(session, CUDA)
    assert operators_on(session, CPU) == frozenset()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (CudaOptions(), {"use_tf32": "1", "prefer_nhwc": "1", "fuse_conv_bias": "0", "enable_cuda_graph": "0"}),
        (CudaOptions(False, False), {"use_tf32": "0", "prefer_nhwc": "0"}),
        (CudaOptions(fuse_conv_bias=True, capture_graph=True), {"fuse_conv_bias": "1", "enable_cuda_graph": "1"}),
        (CudaOptions(algorithm_search="EXHAUSTIVE"), {"cudnn_conv_algo_search": "EXHAUSTIVE"}),
    ],
)
def test_the_provider_takes_every_option(cuda: FakeCuda, options: CudaOptions, expected: dict[str, str]) -> None:
    session = open_on_cuda(MODEL.read_bytes(), InputShape(1, 64, 64), 2**28, options)
    expected |= {"gpu_mem_limit": str(2**28), "arena_extend_strategy": "kSameAsRequested"}
    assert expected.items() <= session.get_provider_options()[CUDA].items()


# A run


@pytest.mark.parametrize("count", [1, 8])
def test_from_the_second_run_on_nothing_is_allocated_and_only_pictures_and_answers_are_copied(
    cuda: FakeCuda, count: int
) -> None:
    run = runtime().run
    run(canvases(count))
    with cuda.calls() as calls:
        run(canvases(count))
    assert not [call for call in calls if call.what in ALLOCATIONS]
    assert [call.num_bytes for call in calls if call.what == "copy_up"] == [count * 320 * 416 * 3, count * 2 * 8]
    down = [call.num_bytes for call in calls if call.what == "copy_down"]
    assert down == [count * 5000 * each for each in (4 * 4, 4, 8)]
    assert count_of(calls, "convolution") == 58


def test_pictures_and_answers_stay_where_they_are_whatever_runs_between(cuda: FakeCuda) -> None:
    run = runtime().run
    run(canvases(1))
    places = []
    for between in (canvases(1, 640, 640), canvases(2), canvases(1, 800, 1088), canvases(4)):
        with cuda.calls() as calls:
            run(canvases(1))
        places.append([call.address for call in calls if call.what in COPIES])
        run(between)
    assert len(set(places[0])) == 5
    assert places == [places[0]] * 4


def run_by_many_threads(run: object, shapes: Sequence[tuple[int, int]], runs: int = 24) -> None:
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda number: run(canvases(1, *shapes[number % len(shapes)])), range(runs)))  # type: ignore[operator]


SHAPES = ((64, 96), (96, 64), (96, 96))


def test_one_thread_alone_runs_sessions_whoever_calls_and_copies_nothing(cuda: FakeCuda) -> None:
    run = runtime().run
    run_by_many_threads(run, SHAPES)
    with cuda.calls() as calls:
        run_by_many_threads(run, SHAPES)
    assert count_of(calls, "convolution") == 24 * 58
    [runner] = {call.thread for call in calls if call.what in ("launch", "convolution")}
    assert runner not in {call.thread for call in calls if call.what in COPIES}
    assert count_of(calls, "cudnn_handle") == 0


def run_until(ended: threading.Event, runtime: CudaRuntime) -> None:
    while not ended.is_set():
        runtime.run(canvases(4, 640, 640))


def test_graphs_are_captured_when_a_session_opens_and_only_replayed_after(cuda: FakeCuda) -> None:
    options = CudaOptions(capture_graph=True)
    device = CudaDevice("cuda", CARD_BYTES, options)
    model = MODEL.read_bytes()
    runtime = CudaRuntime(
        lambda shape: open_on_cuda(model, shape, CARD_BYTES, options),
        device,
        ResizePolicy(),
        weight_bytes=0,
        bytes_per_pixel=0,
    )
    with cuda.calls() as opening:
        runtime.run(canvases(1, *SHAPES[0]))
        runtime.run(canvases(4, 640, 640))
        with ThreadPoolExecutor(2) as pool:
            ended = threading.Event()
            loads = [pool.submit(run_until, ended, runtime) for _ in range(2)]
            try:
                for shape in SHAPES[1:]:
                    runtime.run(canvases(1, *shape))
            finally:
                ended.set()
            for load in loads:
                load.result()
    assert count_of(opening, "capture") == (len(SHAPES) + 1) * runtime.lanes, "and of what ran meanwhile"
    with cuda.calls() as calls:
        run_by_many_threads(runtime.run, SHAPES)
    assert Counter(call.what for call in calls if not call.what.startswith("copy")) == {"replay": 24}
    assert {call.thread for call in calls if call.what == "replay"} == {
        call.thread for call in opening if call.what == "capture"
    }


# Memory


def test_the_limit_is_a_share_of_what_the_card_has_free(cuda: FakeCuda) -> None:
    assert first_gpu(None).limit_bytes == int(BUDGET_SHARE * CARD_BYTES)


def test_the_memory_limit_holds_through_a_reload_under_load(cuda: FakeCuda) -> None:
    shapes = [(800, 1088), (1088, 800), (800, 800), (640, 1088)]
    old = runtime()
    old.run(canvases(1, *shapes[0]))
    cuda.forget_most_held()
    with ThreadPoolExecutor(2) as pool:
        load = pool.submit(run_by_many_threads, old.run, shapes, 12)
        new = runtime()
        run_by_many_threads(new.run, shapes, 12)
        load.result()
    limit = first_gpu(None).limit_bytes
    assert limit / 2 < cuda.most_held_bytes <= limit
    assert len(old.shapes()) + len(new.shapes()) < 2 * len(shapes), "some were closed for others"


# Failures


def test_memory_that_does_not_suffice_closes_the_session_that_wanted_it_and_none_in_use(cuda: FakeCuda) -> None:
    credulous = runtime(bytes_per_pixel=0)
    credulous.run(canvases(1))
    in_use = credulous.free_lane((320, 416), 1, concurrent=False)
    assert in_use is not None
    with pytest.raises(RuntimeError, match="smaller than requested") as raised:
        credulous.run(canvases(16, 800, 1088))
    failure = InferenceFailed.because(raised.value)
    assert (failure.kind, failure.fatal) == ("oom", False)
    assert credulous.shapes() == [(1, 320, 416)]
    in_use.run(canvases(1))


def test_after_memory_did_not_suffice_all_of_it_can_be_had_again(cuda: FakeCuda) -> None:
    credulous = runtime(bytes_per_pixel=0)
    for count, *size in [(1, 640, 640), (1, 640, 800), (1, 800, 1088), (2, 800, 1088)]:
        credulous.run(canvases(count, *size))
    with pytest.raises(RuntimeError, match="smaller than requested"):
        credulous.run(canvases(16, 800, 1088))
    credulous.run(canvases(2, 1088, 1088))
    assert cuda.held_bytes <= first_gpu(None).limit_bytes


def test_a_card_that_another_process_filled_is_out_of_memory_too(cuda: FakeCuda) -> None:
    with cuda.capacity(cuda.held_bytes), pytest.raises(RuntimeError) as raised:
        runtime(bytes_per_pixel=0).run(canvases(2, 1088, 1088))
    assert InferenceFailed.because(raised.value).kind == "oom"


@pytest.mark.parametrize(("error", "is_fatal"), [(700, True), (719, True), (46, True), (1, False)])
def test_a_lost_device_is_told_from_an_error_that_a_run_survives(cuda: FakeCuda, error: int, is_fatal: bool) -> None:
    run = runtime().run
    run(canvases(1))
    with cuda.lost(error), pytest.raises(Exception, match=f"CUDA failure {error}") as raised:
        run(canvases(1))
    failure = InferenceFailed.because(raised.value)
    assert (failure.kind, failure.fatal) == ("cuda", is_fatal)
    run(canvases(1))
