"""A session of one shape and its buffers, on the CPU."""

import tracemalloc
from typing import Any

import onnxruntime as ort
import pytest

from model.pretrained import PRETRAINED
from model.runtime.cuda_session import Buffers, InputShape, padded_batch
from model.runtime.session import DeviceUnavailable, operators_on
from model.types import CanvasImage
from tests.model.runtime.probe import canvas, loose_probe, open_fixed, probe

TWO_SMALL = InputShape(2, 64, 64)


def buffers_of(count: int, shape: InputShape = TWO_SMALL) -> list[Buffers]:
    session = open_fixed(probe(), shape)
    return [Buffers(session, shape, "cpu", number) for number in range(count)]


def addresses(buffers: Buffers) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in (buffers.inputs | buffers.outputs).items()}


def answer(buffers: Buffers, *canvases: CanvasImage) -> list[Any]:
    buffers.load(canvases)
    buffers.run()
    return [output.tolist() for output in buffers.read(len(canvases))]


def test_buffers_are_at_the_same_addresses_run_after_run() -> None:
    [buffers] = buffers_of(1)
    before = addresses(buffers)
    assert len(set(before.values())) == 4
    for value in (3, 4, 5):
        assert answer(buffers, canvas(value), canvas(value + 10)) == [[value, value + 10], [[50, 60]] * 2]
        assert addresses(buffers) == before
        assert buffers.outputs["values"].numpy()[0] == value, (
            "the graph wrote into our memory, not into some of its own"
        )


def test_pictures_are_laid_straight_into_the_memory_that_is_there() -> None:
    [buffers] = buffers_of(1)
    pictures = [canvas(1), canvas(2)]
    tracemalloc.start()
    try:
        buffers.load(pictures)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < pictures[0].pixels.nbytes


def test_an_answer_is_not_changed_by_the_next_one() -> None:
    [buffers] = buffers_of(1)
    buffers.load([canvas(1)])
    buffers.run()
    first = buffers.read(1)
    answer(buffers, canvas(2))
    assert first[0].tolist() == [1]


def test_two_buffers_of_a_session_do_not_touch_each_other() -> None:
    one, other = buffers_of(2)
    one.load([canvas(1), canvas(2)])
    other.load([canvas(3), canvas(4)])
    one.run()
    other.run()
    assert one.read(2)[0].tolist() == [1, 2]
    assert other.read(2)[0].tolist() == [3, 4]


def test_a_graph_whose_outputs_have_no_fixed_size_is_refused() -> None:
    session = ort.InferenceSession(loose_probe(), providers=["CPUExecutionProvider"])
    with pytest.raises(DeviceUnavailable, match=r"places .* is not of a fixed size"):
        Buffers(session, InputShape(1, 8, 8), "cpu")


@pytest.mark.parametrize(("count", "padded"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 16)])
def test_batches_are_padded_to_powers_of_two(count: int, padded: int) -> None:
    assert padded_batch(count) == padded


def test_with_every_size_fixed_the_shipped_graph_computes_no_shapes() -> None:
    """ONNX Runtime would do that on the CPU, and so would a Gather that reads a shape."""
    session = open_fixed(PRETRAINED.read_bytes(), InputShape(2, 96, 128))
    operators = operators_on(session, "CPUExecutionProvider")
    assert {"Conv", "TopK", "GatherElements"} <= operators
    assert not operators & {"Shape", "Size", "Gather", "NonZero", "Range", "ConstantOfShape"}
    assert [output.shape for output in session.get_outputs()] == [[2, 5000, 4], [2, 5000], [2, 5000]]
