"""Anchors and the coding of boxes, against torchvision and the figures of its generator."""

import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from model.anchors import AnchorConfig, Anchors, cell_anchors, decode_boxes, encode_boxes

GRIDS_800 = [(100, 100), (50, 50), (25, 25), (13, 13), (7, 7)]


def grids_of(height: int, width: int) -> list[tuple[int, int]]:
    return [(math.ceil(height / 2**level), math.ceil(width / 2**level)) for level in range(3, 8)]


@pytest.mark.parametrize(
    ("canvas", "count", "last", "total"),
    [
        ((800, 800), 120_087, [397, 110, 971, 1258], 189_310_032),
        ((800, 1344), 201_600, [933, 110, 1507, 1258], 427_506_156),
        ((640, 640), 76_725, [225, -62, 799, 1086], 96_422_400),
    ],
)
def test_anchors_of_a_canvas_have_torchvisions_number_and_sum(
    canvas: tuple[int, int], count: int, last: list[int], total: int
) -> None:
    anchors = torch.cat(Anchors(AnchorConfig(stride="torchvision"))(canvas, grids_of(*canvas)))
    assert len(anchors) == count
    assert anchors[-1].tolist() == last
    assert anchors.double().sum().item() == total


def test_anchors_equal_those_of_torchvisions_generator() -> None:
    sizes = tuple((size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))) for size in (32, 64, 128, 256, 512))
    generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    canvas = (416, 608)
    images = ImageList(torch.zeros(1, 3, *canvas), [canvas])
    theirs = generator(images, [torch.zeros(1, 1, *grid) for grid in grids_of(*canvas)])[0]
    ours = torch.cat(Anchors(AnchorConfig(stride="torchvision"))(canvas, grids_of(*canvas)))
    assert torch.equal(ours, theirs)


def test_exact_strides_are_powers_of_two_on_every_level() -> None:
    levels = Anchors(AnchorConfig())((800, 800), GRIDS_800)
    steps = [(level[9] - level[0])[0].item() for level in levels]
    assert steps == [8, 16, 32, 64, 128]


def test_aspect_ratio_is_height_over_width_and_keeps_the_area() -> None:
    wide, square, tall = cell_anchors(512, scales=[1], aspect_ratios=[0.5, 1, 2])
    assert (wide[3] - wide[1]) / (wide[2] - wide[0]) == pytest.approx(0.5, abs=0.01)
    assert (tall[3] - tall[1]) / (tall[2] - tall[0]) == pytest.approx(2, abs=0.01)
    areas = [float((box[2] - box[0]) * (box[3] - box[1])) for box in (wide, square, tall)]
    assert areas == pytest.approx([512**2] * 3, rel=0.01)


def test_anchors_add_nothing_to_the_state_dict() -> None:
    assert not Anchors(AnchorConfig()).state_dict()


@pytest.mark.parametrize("field", ["base_sizes", "scales", "aspect_ratios"])
def test_an_anchor_configuration_without_values_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match="above 0"):
        AnchorConfig(**{field: ()})  # type: ignore[arg-type]


def random_boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 500
    return torch.cat([corners, corners + 8 + torch.rand(count, 2, generator=generator) * 300], dim=1)


def test_decoding_undoes_encoding() -> None:
    boxes, anchors = random_boxes(500, seed=0), random_boxes(500, seed=1)
    torch.testing.assert_close(decode_boxes(encode_boxes(boxes, anchors), anchors), boxes, rtol=1e-4, atol=1e-2)


def test_the_coder_equals_torchvisions() -> None:
    boxes, anchors = random_boxes(200, seed=2), random_boxes(200, seed=3)
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    deltas = torch.randn(200, 4, generator=torch.Generator().manual_seed(4)) * 3
    torch.testing.assert_close(encode_boxes(boxes, anchors), coder.encode_single(boxes, anchors))
    torch.testing.assert_close(decode_boxes(deltas, anchors), coder.decode_single(deltas, anchors))


def test_a_huge_delta_is_limited_to_1000_sixteenths_of_the_anchor() -> None:
    [box] = decode_boxes(torch.tensor([[0.0, 0, 1e9, 1e9]]), torch.tensor([[0.0, 0, 16, 16]]))
    assert (box[2] - box[0]).item() == pytest.approx(1000, rel=1e-5)
