import json
from dataclasses import replace

import pytest

from model.metadata import LATER_FIELDS, AnchorConfig, InvalidModel, Label, ModelMetadata, ResizePolicy

FULL = ModelMetadata(
    name="shapes é",
    labels=(Label(1, "circle"), Label(7, "traffic light"), Label(3, "3")),
    architecture="resnet50 fpn(256, P3-P7)",
    precision="fp16",
    resize=ResizePolicy(640, 1024, 64),
    score_threshold=0.1,
    nms_threshold=0.45,
    max_detections=100,
    data_set='"quoted", {braced}',
    ap=0.8125,
    training={"command": "python -m training train --seed 0", "steps": "9000"},
    anchors=AnchorConfig((16, 32.5), (1,), (0.5, 1), lowest_level=2, stride="torchvision"),
    suggested_score_threshold=0.375,
    made_for="cpu",
)
LEAST = ModelMetadata(name="x", labels=(Label(0, "thing"),), architecture="")


@pytest.mark.parametrize("metadata", [FULL, LEAST])
def test_metadata_survives_the_file(metadata: ModelMetadata) -> None:
    props = metadata.to_props()
    assert all(isinstance(value, str) for value in props.values())
    assert ModelMetadata.from_props(props) == metadata


def test_defaults_are_the_papers_and_torchvisions() -> None:
    assert LEAST.resize == ResizePolicy(shorter_side=800, longest_side=1333, divisor=32)
    assert (LEAST.score_threshold, LEAST.nms_threshold, LEAST.max_detections) == (0.05, 0.5, 300)


def test_foreign_properties_are_left_alone() -> None:
    assert ModelMetadata.from_props(FULL.to_props() | {"author": "someone", "retinaserve.later": "{"}) == FULL


@pytest.mark.parametrize("key", sorted(set(FULL.to_props()) - {f"retinaserve.{name}" for name in LATER_FIELDS}))
def test_a_missing_property_is_named(key: str) -> None:
    props = FULL.to_props()
    del props[key]
    with pytest.raises(InvalidModel, match="no retinaserve metadata" if key.endswith("format_version") else key):
        ModelMetadata.from_props(props)


@pytest.mark.parametrize("name", LATER_FIELDS)
def test_a_file_older_than_a_value_in_it_is_read(name: str) -> None:
    props = FULL.to_props()
    del props[f"retinaserve.{name}"]
    default = {"made_for": "any"}.get(name)
    assert ModelMetadata.from_props(props) == replace(FULL, **{name: default})  # type: ignore[arg-type]


def test_a_file_of_another_program_is_told_how_to_be_made() -> None:
    with pytest.raises(InvalidModel, match="python -m training export"):
        ModelMetadata.from_props({"author": "someone"})


def test_another_format_version_is_refused() -> None:
    with pytest.raises(InvalidModel, match="format version is 2; this program reads 1"):
        ModelMetadata.from_props(FULL.to_props() | {"retinaserve.format_version": "2"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("labels", "[]"),
        ("labels", "[{"),
        ("labels", "{}"),
        ("labels", '[{"class_id": "one", "label": "circle"}]'),
        ("labels", '[{"class_id": 1}]'),
        ("labels", '[{"class_id": 1, "label": "a"}, {"class_id": 1, "label": "b"}]'),
        ("labels", '[{"class_id": 1, "label": "a"}, {"class_id": 2, "label": "a"}]'),
        ("precision", "fp64"),
        ("resize", '{"shorter_side": 900, "longest_side": 800, "divisor": 32}'),
        ("resize", '{"shorter_side": 0, "longest_side": 800, "divisor": 32}'),
        ("resize", '{"shorter_side": 600, "longest_side": 800, "divisor": 0}'),
        ("resize", "800"),
        ("score_threshold", "1.5"),
        ("nms_threshold", "NaN"),
        ("max_detections", "0"),
        ("max_detections", "2.5"),
        ("ap", "NaN"),
        ("ap", '"high"'),
        ("training", "[]"),
        ("anchors", '{"base_sizes": [0, 32]}'),
        ("anchors", '{"base_sizes": [NaN]}'),
        ("anchors", '{"base_sizes": ["wide"]}'),
    ],
)
def test_a_malformed_property_is_one_clear_line(name: str, value: str) -> None:
    with pytest.raises(InvalidModel) as caught:
        ModelMetadata.from_props(FULL.to_props() | {f"retinaserve.{name}": value})
    assert "\n" not in str(caught.value)
    assert name.split("_")[-1] in str(caught.value) or "label" in str(caught.value)


def test_what_cannot_be_read_back_cannot_be_made() -> None:
    for mistake in (
        {"labels": ()},
        {"score_threshold": -0.1},
        {"ap": float("nan")},
        {"suggested_score_threshold": 1.5},
        {"max_detections": 0},
    ):
        with pytest.raises(InvalidModel):
            replace(FULL, **mistake)


def test_values_other_than_text_are_stored_as_json() -> None:
    assert json.loads(FULL.to_props()["retinaserve.labels"])[1] == {"class_id": 7, "label": "traffic light"}
    assert FULL.to_props()["retinaserve.name"] == "shapes é"


def test_canvases_labels_and_names_are_bounded() -> None:
    assert ResizePolicy(4096, 4096).largest_canvas == (4096, 4096)
    for policy in ((4096, 4097, 32), (800, 10**9, 32), (1, 1, 4097), (5000, 5000, 1)):
        with pytest.raises(InvalidModel, match="16777216 are allowed"):
            ResizePolicy(*policy)
    replace(LEAST, name="é" * 200, labels=tuple(Label(number, str(number)) for number in range(20_000)))
    for broken in (
        {"name": "x" * 201},
        {"name": "line\nbreak"},
        {"labels": (Label(1, "x" * 201),)},
        {"labels": (Label(1, "\x1b[31mred"),)},
        {"labels": tuple(Label(number, str(number)) for number in range(20_001))},
    ):
        with pytest.raises(InvalidModel, match="allowed"):
            replace(LEAST, **broken)


def test_metadata_of_many_megabytes_are_refused_unread() -> None:
    with pytest.raises(InvalidModel, match="characters of metadata"):
        ModelMetadata.from_props(FULL.to_props() | {"retinaserve.training": "[" * 5_000_000})
