import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto

from model.detector import Detector, DeviceUnavailable, InferenceFailed
from model.image import to_canvas, to_original
from model.metadata import InvalidModel, Label, ModelMetadata
from model.runtime.session import has_cuda_build
from model.suppress import suppress
from model.tiles import Found, Tiling, merge, whole, windows
from model.types import Candidates, CanvasImage, Detections, Pixels
from tests.support.tiny_model import SHAPES, SMALL, tiny_graph, write_tiny_model

METADATA = ModelMetadata("tiny", SHAPES, "4x4 colours", resize=SMALL)


@pytest.fixture
def tiny(tmp_path: Path) -> Detector:
    write_tiny_model(tmp_path / "tiny.onnx")
    return Detector(tmp_path / "tiny.onnx", device="cpu", threads=1)


def picture(height: int = 60, width: int = 80, seed: int = 0) -> Pixels:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)


def canvases(count: int, height: int = 60, width: int = 80) -> list[CanvasImage]:
    return [to_canvas(picture(height, width, seed), SMALL) for seed in range(count)]


def assert_same(found: Sequence[Candidates], expected: Sequence[Candidates]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
        np.testing.assert_array_equal(one.labels, other.labels)


# Opening


def test_an_open_file_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    metadata = write_tiny_model(path, name="mine", labels=[Label(3, "cat"), Label(5, "dog")])
    detector = Detector(path)
    assert detector.metadata == metadata
    assert detector.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert detector.path == path
    assert (detector.device_requested, detector.provider) == ("auto", "CPUExecutionProvider")


def test_what_was_opened_runs_on_when_the_file_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    write_tiny_model(path)
    detector = Detector(path)
    path.unlink()
    assert len(detector.detect(picture())) > 0


@pytest.mark.skipif(has_cuda_build(), reason="this ONNX Runtime is built for CUDA")
def test_cuda_is_refused_where_onnx_runtime_has_none(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "a.onnx")
    with pytest.raises(DeviceUnavailable, match="built without CUDA"):
        Detector(tmp_path / "a.onnx", device="cuda")
    assert not Detector(tmp_path / "a.onnx", device="auto").fell_back


def renamed_input(model: onnx.ModelProto) -> None:
    model.graph.node.add(op_type="Identity", input=["pictures"], output=["images"])
    model.graph.node.insert(0, model.graph.node.pop())
    model.graph.input[0].name = "pictures"


def fixed_batch(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1


def nameless_height(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "h"


def float_labels(model: onnx.ModelProto) -> None:
    model.graph.node.add(op_type="Cast", input=["labels"], output=["labels_f"]).attribute.append(
        onnx.helper.make_attribute("to", TensorProto.FLOAT)
    )
    model.graph.output[2].name = "labels_f"
    model.graph.output[2].type.tensor_type.elem_type = TensorProto.FLOAT


def one_output_less(model: onnx.ModelProto) -> None:
    del model.graph.output[2]


def custom_operator(model: onnx.ModelProto) -> None:
    model.opset_import.append(onnx.helper.make_opsetid("my.operators", 1))
    model.graph.node[0].domain = "my.operators"


def no_metadata(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]


def future_format(model: onnx.ModelProto) -> None:
    onnx.helper.set_model_props(model, METADATA.to_props() | {"retinaserve.format_version": "99"})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (renamed_input, r"has pictures tensor\(uint8\).*; a detector has images uint8 \[batch, height, width, 3\]"),
        (fixed_batch, r"has images tensor\(uint8\) \[1, 'height', 'width', 3\]"),
        (nameless_height, "a detector has images"),
        (float_labels, "a detector has images"),
        (one_output_less, "a detector has images"),
        (custom_operator, "operators that ONNX Runtime does not know: .*my.operators:Transpose"),
        (no_metadata, "carries no retinaserve metadata"),
        (future_format, "format version is 99"),
    ],
)
def test_files_that_are_no_detector_are_refused_in_one_line(
    tmp_path: Path, spoil: Callable[[onnx.ModelProto], None], words: str
) -> None:
    model = tiny_graph(METADATA, seed=0)
    spoil(model)
    onnx.save(model, tmp_path / "bad.onnx")
    with pytest.raises(InvalidModel, match=words) as caught:
        Detector(tmp_path / "bad.onnx")
    assert "bad.onnx" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_external_data_is_refused_even_where_it_could_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    many = [Label(number, str(number)) for number in range(400)]
    model = tiny_graph(ModelMetadata("tiny", tuple(many), "", resize=SMALL), seed=0)
    onnx.save(model, "bad.onnx", save_as_external_data=True, location="weights", size_threshold=1024)
    assert Path("weights").exists()
    with pytest.raises(InvalidModel, match="weights in another file"):
        Detector(Path("bad.onnx"))


def test_damaged_and_missing_files_are_refused_in_one_line(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "good.onnx")
    good = (tmp_path / "good.onnx").read_bytes()
    contents = {"empty": b"", "text": b"hello", "zeros": bytes(500), "half": good[: len(good) // 2], "cut": good[:-9]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    for name in (*contents, "folder", "missing"):
        with pytest.raises(InvalidModel, match=name) as caught:
            Detector(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_never_taken(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "good.onnx")
    good, path = (tmp_path / "good.onnx").read_bytes(), tmp_path / "cut.onnx"
    for end in range(0, len(good), 101):
        path.write_bytes(good[:end])
        with pytest.raises(InvalidModel):
            Detector(path)


# Running


def test_a_batch_is_answered_as_its_images_alone_in_any_order(tiny: Detector) -> None:
    batch = canvases(5)
    alone = [tiny.run([canvas])[0] for canvas in batch]
    assert_same(tiny.run(batch), alone)
    assert_same(tiny.run(batch[::-1]), alone[::-1])
    assert not np.allclose(alone[0].scores, alone[1].scores)


def test_canvases_of_different_sizes_follow_each_other(tiny: Detector) -> None:
    for height, width in [(60, 80), (80, 60), (1, 1), (32, 4000), (60, 80)]:
        [found] = tiny.run(canvases(1, height, width))
        assert (found.boxes.shape, found.boxes.dtype) == ((5000, 4), np.float32)
        assert (found.scores.dtype, found.labels.dtype) == (np.float32, np.int64)


def test_a_batch_of_mixed_canvases_is_our_own_mistake(tiny: Detector) -> None:
    with pytest.raises(AssertionError, match="one size"):
        tiny.run([*canvases(1, 60, 80), *canvases(1, 80, 60)])


def test_detect_is_canvas_run_suppress_and_back(tiny: Detector) -> None:
    image = picture(45, 90)
    canvas = to_canvas(image, SMALL)
    [candidates] = tiny.run([canvas])
    kept = suppress(candidates, score_threshold=0.05, nms_threshold=0.5, max_detections=300)
    assert_equal(tiny.detect(image), to_original(kept, canvas))


def assert_equal(found: Detections, expected: Detections) -> None:
    np.testing.assert_array_equal(found.boxes, expected.boxes)
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.labels, expected.labels)


def test_detect_finds_one_box_for_each_cell_of_the_picture(tiny: Detector) -> None:
    found = tiny.detect(picture(400, 300))
    centres = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
    down, right = np.mgrid[:4, :4]
    expected = np.stack([(right.ravel() + 0.5) * 75, (down.ravel() + 0.5) * 100], axis=1)
    strong = found.scores > 0.05
    assert strong.any()
    for centre in centres[strong]:
        assert np.abs(expected - centre).sum(axis=1).min() < 0.01


def test_tiles_are_run_beside_the_whole_picture(tiny: Detector) -> None:
    image, tiling = picture(100, 300), Tiling(100, 0.5)
    found = [
        Found.of(tiny.run([canvas])[0], canvas, window, (100, 300), score_threshold=0.3, nms_threshold=0.4)
        for window in [whole(100, 300), *windows(100, 300, tiling)]
        for canvas in [to_canvas(window.cut(image), SMALL)]
    ]
    expected = merge(found, nms_threshold=0.4, max_detections=20)
    assert_equal(tiny.detect(image, score_threshold=0.3, nms_threshold=0.4, max_detections=20, tiling=tiling), expected)


def test_a_picture_that_fits_into_a_tile_is_detected_as_without(tiny: Detector) -> None:
    assert_equal(tiny.detect(picture(100, 90), tiling=Tiling(100)), tiny.detect(picture(100, 90)))


def test_parameters_override_the_files_own(tiny: Detector) -> None:
    image = picture()
    everything = tiny.detect(image, score_threshold=0, nms_threshold=1)
    assert len(everything) == 32
    assert len(tiny.detect(image, score_threshold=0)) == 16
    assert len(tiny.detect(image, max_detections=3)) == 3
    assert tiny.detect(image, score_threshold=0.5).scores.min() > 0.5
    one = int(everything.labels[0])
    assert set(tiny.detect(image, label_ids=[one]).labels) == {one}
    assert len(tiny.detect(image, label_ids=[])) == 0


def test_answers_that_are_not_finite_are_failures(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "nan.onnx", nan_on_black=True)
    detector = Detector(tmp_path / "nan.onnx")
    with pytest.raises(InferenceFailed, match="not finite") as caught:
        detector.detect(np.zeros((60, 80, 3), np.uint8))
    assert (caught.value.kind, caught.value.fatal) == ("other", False)
    assert len(detector.detect(picture())) > 0


def test_a_run_that_raises_is_a_failure_and_the_next_one_works(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_tiny_model(tmp_path / "fails.onnx", fail_on_white=True)
    detector = Detector(tmp_path / "fails.onnx", device="cpu")
    with pytest.raises(InferenceFailed, match="out of data bounds") as caught:
        detector.detect(np.full((60, 80, 3), 255, np.uint8))
    assert (caught.value.kind, caught.value.fatal) == ("other", False)
    assert len(detector.detect(picture())) > 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("message", "kind", "fatal"),
    [
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; expr=cudaMemcpy()", "cuda", True),
        ("CUDA failure 719: unspecified launch failure ; GPU=0", "cuda", True),
        ("CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc", "oom", False),
        ("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 9", "oom", False),
        ("CUDNN failure 4: CUDNN_STATUS_ALLOC_FAILED ; GPU=0", "oom", False),
        ("CUDNN failure 3: CUDNN_STATUS_NOT_SUPPORTED ; GPU=0", "cuda", False),
        ("bfc_arena.cc:360 Available memory of 37831936 is smaller than requested bytes of 83558400", "oom", False),
        ("std::bad_alloc", "oom", False),
        ("indices element out of data bounds", "other", False),
    ],
)
def test_failures_are_told_apart_by_onnx_runtimes_words(message: str, kind: str, fatal: bool) -> None:
    failure = InferenceFailed.because(RuntimeError(f"[ONNXRuntimeError] : 1 : FAIL : {message}"))
    assert (failure.kind, failure.fatal) == (kind, fatal)
    assert str(failure) == f"inference failed: {message}"


def test_threads_get_the_answers_of_one(tiny: Detector) -> None:
    images = [picture(50 + seed, 90 - seed, seed) for seed in range(24)]
    with ThreadPoolExecutor(6) as pool:
        for together, alone in zip(pool.map(tiny.detect, images), map(tiny.detect, images), strict=True):
            assert_equal(together, alone)


def test_five_hundred_classes_and_one(tmp_path: Path) -> None:
    for count in (1, 500):
        labels = [Label(2 * number, f"label {number}") for number in range(count)]
        write_tiny_model(tmp_path / "a.onnx", labels=labels)
        found = Detector(tmp_path / "a.onnx").detect(picture())
        assert set(found.labels.tolist()) <= {label.class_id for label in labels}


def test_warming_up_twice_changes_no_answer(tiny: Detector) -> None:
    before = tiny.detect(picture())
    tiny.warm_up()
    tiny.warm_up(max_batch_size=8)
    assert_equal(tiny.detect(picture()), before)


def test_a_warming_run_that_is_not_finite_is_a_failure(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "nan.onnx", nan_on_black=True)
    with pytest.raises(InferenceFailed, match="not finite"):
        Detector(tmp_path / "nan.onnx").warm_up()


# Lanes


def test_runs_on_concurrent_lanes_answer_as_one_alone_does(tmp_path: Path) -> None:
    write_tiny_model(path := tmp_path / "tiny.onnx")
    detector = Detector(path, device="cpu", threads=2, runs_at_once=None)
    detector.warm_up()
    canvas = to_canvas(picture(), detector.metadata.resize)
    [alone] = detector.run([canvas])

    def run_concurrently(_: int) -> Candidates:
        while (lane := detector.free_lane(canvas.canvas_size, 1, concurrent=True)) is None:
            time.sleep(0.001)
        [answer] = detector.run([canvas], lane)
        return answer

    with ThreadPoolExecutor(3) as pool:
        for answer in pool.map(run_concurrently, range(20)):
            np.testing.assert_allclose(answer.scores, alone.scores, atol=1e-6)
            np.testing.assert_allclose(answer.boxes, alone.boxes, atol=1e-4)


@pytest.mark.parametrize(
    ("threads", "runs_at_once", "large", "lanes"),
    [(2, None, False, 2), (2, None, True, 1), (2, 2, True, 2), (1, 2, False, 1), (2, 1, False, 1)],
)
def test_lanes_need_several_threads_and_runs_and_of_a_large_file_to_be_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    runs_at_once: int | None,
    large: bool,
    lanes: int,
) -> None:
    write_tiny_model(path := tmp_path / "tiny.onnx")
    if large:
        monkeypatch.setattr("model.runtime.cpu.LARGE_MODEL_BYTES", path.stat().st_size - 1)
    assert Detector(path, device="cpu", threads=threads, runs_at_once=runs_at_once).lanes == lanes


def test_a_lane_is_free_again_after_a_run_that_fails(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "nan.onnx", nan_on_black=True)
    detector = Detector(tmp_path / "nan.onnx", device="cpu", threads=1)
    black = CanvasImage.uniform((64, 96))
    lane = detector.free_lane(black.canvas_size, 1, concurrent=False)
    assert lane is not None and detector.free_lane(black.canvas_size, 1, concurrent=False) is None
    with pytest.raises(InferenceFailed, match="not finite"):
        detector.run([black], lane)
    assert detector.free_lane(black.canvas_size, 1, concurrent=False) is not None


def test_whoever_wants_to_know_is_told_when_a_run_without_a_lane_of_its_own_has_ended(tiny: Detector) -> None:
    told: list[bool] = []
    tiny.when_lane_freed(lambda: told.append(tiny.free_lane((64, 96), 1, concurrent=False) is not None))
    tiny.run(canvases(1))
    assert told == [True]


# CUDA: run where there is a GPU build of ONNX Runtime; with one and no GPU, `auto` must fall back and say so


@pytest.mark.skipif(not has_cuda_build(), reason="needs onnxruntime-gpu")
def test_cuda_agrees_with_the_cpu_or_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.onnx"
    write_tiny_model(path)
    detector = Detector(path, device="auto")
    if detector.fell_back:
        assert detector.provider == "CPUExecutionProvider"
        assert "CUDA cannot be used" in caplog.text
        with pytest.raises(DeviceUnavailable, match="cannot run on CUDA"):
            Detector(path, device="cuda")
    else:
        assert detector.provider == "CUDAExecutionProvider"
        batch = canvases(5)
        for one, other in zip(detector.run(batch), Detector(path, device="cpu").run(batch), strict=True):
            np.testing.assert_allclose(one.scores, other.scores, atol=1e-3)
