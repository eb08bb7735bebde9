"""What OpenAPI says of the routes beyond their types: query, forms of a body, pictures, problems, with examples."""

from typing import Any

from service.api.errors import KINDS, PROBLEM_MEDIA_TYPE, problem
from service.api.schemas import DetectQuery

MAX_BATCH_IMAGES = 16

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

ONE_IMAGE_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": FORM},
        "image/*": {"schema": BINARY},
        "application/octet-stream": {"schema": BINARY},
        "application/json": {"schema": BASE64},
    },
}
BATCH_BODY = {"required": True, "content": {"multipart/form-data": {"schema": FORM_OF_IMAGES}}}
PARAMETERS = [
    {"name": name, "in": "query", "required": False, "schema": schema, "description": schema["description"]}
    for name, schema in DetectQuery.model_json_schema()["properties"].items()
]
PROBLEM_SCHEMA = {"$ref": "#/components/schemas/Problem"}
"""The model itself comes into the document with BatchAnswer."""
EVERYWHERE = ("unauthorized", "internal_error")
UPLOAD = (
    "malformed_request", "upload_timeout", "body_too_large", "unsupported_media_type", "invalid_parameter",
    "overloaded", "not_ready", *EVERYWHERE,
)  # fmt: skip
ONE_IMAGE = (*UPLOAD, "too_many_pixels", "invalid_image", "inference_failed", "deadline_exceeded")

PICTURE_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/png": {"schema": BINARY}, "image/jpeg": {"schema": BINARY}}}
}


def problems(*codes: str) -> dict[int | str, dict[str, Any]]:
    """The answers of these codes, with an example each; codes of one status share an answer."""
    answers: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        kind = KINDS[code]
        example = {"summary": kind.title, "value": problem(code, "what came, and what is allowed", "2f1d7e0c6a5b")}
        content = {PROBLEM_MEDIA_TYPE: {"schema": PROBLEM_SCHEMA, "examples": {}}}
        answer = answers.setdefault(kind.status, {"description": "", "content": content})
        answer["description"] = "; ".join(filter(None, [answer["description"], f"{kind.title} (`{code}`)"]))
        answer["content"][PROBLEM_MEDIA_TYPE]["examples"][code] = example
    return answers
