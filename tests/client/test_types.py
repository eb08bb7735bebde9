"""The client's values and options against the service's OpenAPI document."""

import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import pytest

from retinaserve_client import Answer, Model, Options
from tests.support.serving import FakeDetector, serving

NAMES = {str: "string", int: "integer", float: "number", bool: "boolean"}
Json = dict[str, Any]


@pytest.fixture(scope="module")
def document() -> Json:
    with serving(FakeDetector()) as server:
        found: Json = server.client.get("/openapi.json").json()
    return found


def differences(kind: Any, schema: Json, document: Json, where: str) -> list[str]:
    """The places at which the client's type is not the schema's."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if typing.get_origin(kind) is types.UnionType:
        [kind] = set(typing.get_args(kind)) - {types.NoneType}
        schemas = schema.get("anyOf", [schema])
        return differences(kind, next(each for each in schemas if each.get("type") != "null"), document, where)
    if typing.get_origin(kind) is tuple:
        return differences(typing.get_args(kind)[0], schema["items"], document, f"{where}[]")
    if kind in NAMES:
        return [] if schema.get("type") == NAMES[kind] else [f"{where}: {kind.__name__}, not {schema}"]
    optional = {each.name for each in fields(kind) if each.default is not MISSING} if is_dataclass(kind) else set()
    wrong = []
    for name, hint in typing.get_type_hints(kind).items():
        if name in schema["properties"]:
            wrong += differences(hint, schema["properties"][name], document, f"{where}.{name}")
        if name not in optional and name not in schema["required"]:
            wrong.append(f"{where}.{name} need not be there")
    return wrong


def test_answer_and_model_are_the_service_s(document: Json) -> None:
    schemas = document["components"]["schemas"]
    assert differences(Answer, schemas["Answer"], document, "Answer") == []
    assert differences(Model, schemas["ModelCard"], document, "Model") == []


def test_a_difference_is_seen(document: Json) -> None:
    schemas = document["components"]["schemas"]
    assert differences(Model, schemas["Answer"], document, "")
    assert differences(Answer, schemas["Answer"] | {"required": ["detections"]}, document, "")
    assert differences(int, {"type": "string"}, document, "")


def test_every_parameter_of_the_service_is_an_option(document: Json) -> None:
    hints = {name.replace("labels", "label"): hint for name, hint in typing.get_type_hints(Options).items()}
    for parameter in document["paths"]["/detect"]["post"]["parameters"]:
        hint = hints[parameter["name"]]
        if parameter["name"] != "label":
            assert differences(hint, parameter["schema"], document, parameter["name"]) == []
