"""What the OpenAPI document says beyond FastAPI's types: the routes that detect, and every problem, with examples."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.api.errors import PROBLEM_MEDIA_TYPE, PROBLEM_TYPES, problem
from service.api.parameters import DetectQuery
from service.api.schemas import Answer, BatchAnswer
from service.config import MAX_BATCH_IMAGES

DETECT = "/detect"
DETECT_BATCH = "/detect/batch"
SCHEMAS = "#/components/schemas/"

BINARY = {"type": "string", "format": "binary"}
FORM = {"type": "object", "required": ["image"], "additionalProperties": False, "properties": {"image": BINARY}}
ONE_PIXEL_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNgAAAAAgAB5Sfe/AAAAABJRU5ErkJggg=="
BASE64 = {
    "type": "object",
    "required": ["image"],
    "additionalProperties": False,
    "properties": {"image": {"type": "string", "format": "byte"}},
    "example": {"image": ONE_PIXEL_PNG},
}
IMAGES = {"type": "array", "items": BINARY, "minItems": 1, "maxItems": MAX_BATCH_IMAGES}
FORM_OF_IMAGES = FORM | {"properties": {"image": IMAGES}}
QUERY_SCHEMA = DetectQuery.model_json_schema()

EVERYWHERE = ("unauthorized", "internal_error")
UPLOAD = (
    "malformed_request", "upload_timeout", "body_too_large", "unsupported_media_type", "invalid_parameter",
    "overloaded", "not_ready", *EVERYWHERE,
)  # fmt: skip
ONE_IMAGE = (*UPLOAD, "too_many_pixels", "invalid_image", "inference_failed", "deadline_exceeded")


def problems(*codes: str) -> dict[int | str, dict[str, Any]]:
    """The answers of these codes, with an example each; codes of one status share an answer."""
    answers: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        kind = PROBLEM_TYPES[code]
        example = {"summary": kind.title, "value": problem(code, "what came, and what is allowed", "2f1d7e0c6a5b")}
        content = {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": f"{SCHEMAS}Problem"}, "examples": {}}}
        answer = answers.setdefault(kind.status, {"description": "", "content": content})
        answer["description"] = "; ".join(filter(None, [answer["description"], f"{kind.title} (`{code}`)"]))
        answer["content"][PROBLEM_MEDIA_TYPE]["examples"][code] = example
    return answers


def add_detection(document: dict[str, Any]) -> None:
    """Describe the routes that FastAPI does not know in its document of the others."""
    document["paths"] = DETECTION | document["paths"]
    _, schemas = models_json_schema(
        [(Answer, "serialization"), (BatchAnswer, "serialization")], ref_template=SCHEMAS + "{model}"
    )
    document["components"]["schemas"] |= schemas["$defs"]  # with Problem, which BatchAnswer is made of


def _post(
    operation_id: str,
    summary: str,
    description: str,
    body: dict[str, Any],
    answer: type[BaseModel],
    codes: tuple[str, ...],
    *picture_types: str,
) -> dict[str, Any]:
    """A path that detects: its bodies and answers by media type."""
    json = {"application/json": {"$ref": SCHEMAS + answer.__name__}}
    good = _content(json | dict.fromkeys(picture_types, BINARY))
    return {
        "post": {
            "summary": summary,
            "description": description,
            "operationId": operation_id,
            "parameters": [_parameter(name, schema) for name, schema in QUERY_SCHEMA["properties"].items()],
            "requestBody": {"required": True, "content": _content(body)},
            "responses": {"200": {"description": "Successful Response", "content": good}}
            | {str(status): answers for status, answers in problems(*codes).items()},
        }
    }


def _parameter(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    shown = {key: value for key, value in schema.items() if value is not None}  # a query has no way to say null
    return {"name": name, "in": "query", "required": False, "schema": shown, "description": schema["description"]}


def _content(schemas: dict[str, Any]) -> dict[str, Any]:
    return {media_type: {"schema": schema} for media_type, schema in schemas.items()}


DETECTION = {
    DETECT: _post(
        "detect_detect_post",
        "Detect objects in one image",
        "One image in, its answer or its drawing out.",
        {
            "multipart/form-data": FORM,
            "image/*": BINARY,
            "application/octet-stream": BINARY,
            "application/json": BASE64,
        },
        Answer,
        ONE_IMAGE,
        "image/png",
        "image/jpeg",
    ),
    DETECT_BATCH: _post(
        "detect_batch_detect_batch_post",
        f"Detect objects in up to {MAX_BATCH_IMAGES} images",
        f"Up to {MAX_BATCH_IMAGES} images in, for each an answer or a problem out.",
        {"multipart/form-data": FORM_OF_IMAGES},
        BatchAnswer,
        UPLOAD,
    ),
}
"""The paths of the document that detect."""
