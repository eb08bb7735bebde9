"""Winograd's convolutions in ONNX operators, against ONNX Runtime's own."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from model.detector import Detector
from model.folding import fold_norms
from model.metadata import ModelMetadata, ResizePolicy
from model.types import CanvasImage
from tests.support.background import Background
from tests.support.networks import TINY, assert_agree, draw, tiny_checkpoint
from training.checkpoint import Checkpoint, build_detector
from training.exchange.onnx_file import describe, export, to_onnx
from training.exchange.winograd import to_winograd, transformed

LAYERS = """
<ir_version: 10, opset_import: ["" : 18]>
layers (float[batch,8,height,width] x) => (float[batch,12,h,w] y, float[batch,8,h2,w2] z) {
    a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, first, bias)
    b = Relu(a)
    y = Conv<kernel_shape=[3,3], pads=[1,1,1,1], strides=[1,1]>(b, second)
    z = Conv<kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,2]>(b, strided)
}
"""


def layers() -> onnx.ModelProto:
    model = onnx.parser.parse_model(LAYERS)
    rng = np.random.default_rng(0)
    shapes = {"first": (8, 8, 3, 3), "bias": (8,), "second": (12, 8, 3, 3), "strided": (8, 8, 3, 3)}
    for name, shape in shapes.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.normal(0, 0.2, shape).astype(np.float32), name))
    return model


def rewritten(model: onnx.ModelProto, min_channels: int = 8) -> onnx.ModelProto:
    model = to_winograd(model, (64, 64), min_channels=min_channels, min_tiles=1)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, images: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": images})


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (4, 4), (5, 4), (7, 9), (16, 13), (1, 125)])
@pytest.mark.parametrize("batch", [1, 3])
def test_layers_answer_as_before_at_every_size_and_batch(size: tuple[int, int], batch: int) -> None:
    images = np.random.default_rng(1).normal(size=(batch, 8, *size)).astype(np.float32)
    for ours, theirs in zip(run(rewritten(layers()), images), run(layers(), images), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * max(1, np.abs(theirs).max()))


def test_layers_of_stride_1_are_rewritten_and_stay_in_tiles_between() -> None:
    model = rewritten(layers())
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["Conv"] == 1, "the strided one"
    perms = Counter(tuple(node.attribute[0].ints) for node in model.graph.node if node.op_type == "Transpose")
    assert perms[0, 2, 3, 1] == 1, "once for both layers"
    assert perms[0, 3, 1, 2] == 2, "for y, and for the strided layer"
    assert kinds["Gather"] - gathers_of_sizes(model) == 4, (
        "the windows of two layers, and y, and the strided layer's map"
    )
    assert not model.functions
    names = {each.name for each in model.graph.initializer}
    assert {"first.winograd", "second.winograd", "strided", "bias.winograd"} <= names
    assert not {"first", "second", "bias"} & names


def gathers_of_sizes(model: onnx.ModelProto) -> int:
    """Count the nodes that take a side out of a map's shape."""
    shapes = {node.output[0] for node in model.graph.node if node.op_type == "Shape"}
    return sum(node.op_type == "Gather" and node.input[0] in shapes for node in model.graph.node)


def test_layers_of_too_few_channels_or_tiles_are_left_alone() -> None:
    assert rewritten(layers(), min_channels=9).graph == layers().graph
    assert to_winograd(layers(), (64, 64), min_channels=8, min_tiles=257).graph == layers().graph
    assert to_winograd(layers(), (64, 64), min_channels=8, min_tiles=256).graph != layers().graph


def test_a_layer_whose_bias_is_computed_is_left_alone() -> None:
    model = layers()
    next(node for node in model.graph.node if node.op_type == "Conv").input[2] = "computed"
    model.graph.node.insert(0, onnx.helper.make_node("Identity", ["bias"], ["computed"]))
    assert Counter(node.op_type for node in rewritten(model).graph.node)["Conv"] == 2, "it, and the strided one"


def test_a_transformed_weight_of_one_is_the_transforms_outer_product() -> None:
    ones = transformed(np.ones((1, 1, 3, 3), np.float32)).reshape(6, 6)
    sides = np.array([1 / 4, -1 / 2, -1 / 6, 7 / 24, 1 / 8, 1])
    np.testing.assert_allclose(ones, np.outer(sides, sides), rtol=1e-6)


def wide_checkpoint() -> Checkpoint:
    """A tiny backbone before a pyramid and heads of 256 channels."""
    config = replace(TINY, fpn_channels=256, head_channels=256)
    return tiny_checkpoint(config=config, resize=ResizePolicy(256, 448))


def exported(folder: Path) -> Path:
    """Make plain.onnx, and cpu.onnx: its 3x3 layers of stride 1 are rewritten, down to 16 channels."""
    checkpoint = wide_checkpoint()
    plain = to_onnx(fold_norms(build_detector(checkpoint)))
    onnx.helper.set_model_props(plain, describe(checkpoint, "a", "fp32").to_props())
    onnx.save(plain, folder / "plain.onnx")
    onnx.save(to_winograd(plain, (256, 352), min_channels=16, min_tiles=1), folder / "cpu.onnx")
    return folder


FILES = Background(exported)


@pytest.fixture(scope="module")
def detectors() -> tuple[Detector, Detector]:
    """Open cpu.onnx and plain.onnx."""
    nodes = onnx.load(FILES.result() / "cpu.onnx").graph.node
    products = [node for node in nodes if node.op_type == "MatMul" and node.input[1].endswith(".winograd")]
    assert len(products) >= 15
    winograd, plain = (Detector(FILES.result() / name, device="cpu", threads=1) for name in ("cpu.onnx", "plain.onnx"))
    return winograd, plain


@pytest.mark.slow
@pytest.mark.needs(FILES)
@pytest.mark.parametrize(
    ("batch", "size"), [(1, (32, 32)), (3, (32, 96)), (2, (128, 192)), (1, (224, 96)), (1, (32, 4000)), (8, (64, 64))]
)
def test_a_detector_answers_as_the_plain_one_for_every_batch_and_canvas(
    detectors: tuple[Detector, Detector], batch: int, size: tuple[int, int]
) -> None:
    canvases = [CanvasImage(draw(*size, seed), (size[0] - seed, size[1]), size) for seed in range(batch)]
    for ours, theirs in zip(*(detector.run(canvases) for detector in detectors), strict=True):
        np.testing.assert_allclose(np.sort(ours.scores), np.sort(theirs.scores), atol=1e-3)
        np.testing.assert_allclose(ours.boxes.sum(), theirs.boxes.sum(), rtol=1e-2)


@pytest.mark.slow
@pytest.mark.needs(FILES)
@pytest.mark.parametrize("size", [(1, 1), (128, 192), (100, 300)])
def test_a_detector_detects_what_the_plain_one_does(
    detectors: tuple[Detector, Detector], size: tuple[int, int]
) -> None:
    winograd, plain = detectors
    pairs = [(winograd.detect(picture), plain.detect(picture)) for picture in (draw(*size, seed) for seed in range(2))]
    assert_agree(pairs, score_tolerance=1e-3)


@pytest.mark.slow
@pytest.mark.needs(FILES)
def test_an_export_for_cpus_rewrites_the_wide_layers_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = onnx.load(FILES.result() / "plain.onnx")
    monkeypatch.setattr("training.exchange.onnx_file.to_onnx", lambda detector: plain)
    export(wide_checkpoint(), tmp_path / "a.onnx", name="a", made_for="cpu")
    assert Detector(tmp_path / "a.onnx", device="cpu").metadata.made_for == "cpu"
    rewritten = {each.name for each in onnx.load(tmp_path / "a.onnx").graph.initializer if "winograd" in each.name}
    heads = {f"network.head.{subnet}_head.conv.0.0.weight.winograd" for subnet in ("classification", "regression")}
    assert heads <= rewritten
    assert not any(".body." in name for name in rewritten), "its layers have 128 channels at most"


def test_an_export_for_cpus_is_fp32_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--for cpu is a form of fp32"):
        export(tiny_checkpoint(lively=False), tmp_path / "b.onnx", name="b", precision="fp16", made_for="cpu")


def test_a_file_without_a_word_of_its_device_is_for_any() -> None:
    props = replace(describe(tiny_checkpoint(lively=False), "a", "fp32"), made_for="cpu").to_props()
    assert ModelMetadata.from_props(props).made_for == "cpu"
    del props["retinaserve.made_for"]
    assert ModelMetadata.from_props(props).made_for == "any"
