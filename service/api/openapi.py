"""The parts of the OpenAPI document that FastAPI does not make (detecting routes and problems, with examples), and the
page that shows it.
"""

from collections.abc import Sequence
from typing import Any

from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from pydantic.json_schema import models_json_schema

from service.api.errors import PROBLEM_MEDIA_TYPE, PROBLEM_TYPES, problem
from service.api.huggingface import INPUTS, PARAMETERS, THRESHOLD
from service.api.parameters import DetectQuery
from service.api.paths import DETECT, DETECT_BATCH, HUGGING_FACE
from service.api.schemas import BatchAnswer
from service.config import MAX_BATCH_IMAGES

REFERENCE = "#/components/schemas/{model}"
Schemas = dict[str, Any]


def _form(image: Schemas) -> Schemas:
    return {"type": "object", "required": ["image"], "additionalProperties": False, "properties": {"image": image}}


BINARY = {"type": "string", "format": "binary"}
ONE_PIXEL_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNgAAAAAgAB5Sfe/AAAAABJRU5ErkJggg=="
BASE64 = _form({"type": "string", "format": "byte"}) | {"example": {"image": ONE_PIXEL_PNG}}
IMAGES = {"type": "array", "items": BINARY, "minItems": 1, "maxItems": MAX_BATCH_IMAGES}
QUERY_SCHEMA = DetectQuery.model_json_schema()
HUGGING_FACE_PARAMETERS = QUERY_SCHEMA["properties"] | {THRESHOLD: QUERY_SCHEMA["properties"]["score_threshold"]}
HUGGING_FACE_JSON = {
    "type": "object",
    "required": [INPUTS],
    "additionalProperties": False,
    "properties": {
        INPUTS: {"type": "string", "format": "byte"},
        PARAMETERS: {"type": ["object", "null"], "additionalProperties": False, "properties": HUGGING_FACE_PARAMETERS},
    },
    "example": {INPUTS: ONE_PIXEL_PNG, PARAMETERS: {THRESHOLD: 0.5}},
}

INDEX = {
    "text/html": {"type": "string"},
    "application/json": {
        "type": "object",
        "required": ["name", "links"],
        "properties": {
            "name": {"type": "string"},
            "links": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    },
}
EVERYWHERE = ("unauthorized", "uri_too_long", "headers_too_large", "internal_error")
UPLOAD = (
    "malformed_request", "upload_timeout", "body_too_large", "unsupported_media_type", "invalid_parameter",
    "overloaded", "not_ready", *EVERYWHERE,
)  # fmt: skip
ONE_IMAGE = (*UPLOAD, "not_acceptable", "too_many_pixels", "invalid_image", "inference_failed", "deadline_exceeded")


def problems(*codes: str) -> dict[int | str, dict[str, Any]]:
    """Describe the answers of these codes, with an example each; codes of one status share an answer."""
    answers: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        kind = PROBLEM_TYPES[code]
        example = {"summary": kind.title, "value": problem(code, "what came, and what is allowed", "2f1d7e0c6a5b")}
        content = {PROBLEM_MEDIA_TYPE: {"schema": _ref("Problem"), "examples": {}}}
        answer = answers.setdefault(kind.status, {"description": "", "content": content})
        answer["description"] = "; ".join(filter(None, [answer["description"], f"{kind.title} (`{code}`)"]))
        answer["content"][PROBLEM_MEDIA_TYPE]["examples"][code] = example
    return answers


async def docs_page() -> HTMLResponse:
    """Make Swagger UI's page, with relative links, which work below any prefix; its files are fastapi_offline's."""
    files = "static-offline-docs"
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title="retinaserve",
        swagger_js_url=f"{files}/swagger-ui-bundle.js",
        swagger_css_url=f"{files}/swagger-ui.css",
        swagger_favicon_url=f"{files}/favicon.png",
    )


def add_detection(document: dict[str, Any]) -> None:
    """Add the routes that FastAPI does not know to its document."""
    document["paths"] = {
        path: DETECTION.get(path, {}) | others for path, others in (DETECTION | document["paths"]).items()
    }
    _, schemas = models_json_schema([(BatchAnswer, "serialization")], ref_template=REFERENCE)
    document["components"]["schemas"] |= schemas["$defs"]  # with Answer and Problem, which it is made of


def _post(
    operation_id: str, summary: str, description: str, *, body: Schemas, answer: Schemas, codes: Sequence[str]
) -> Schemas:
    """Describe a path that detects: the schemas of its body and answer by media type, and the codes of its problems."""
    good = {"description": "Successful Response", "content": _content(answer)}
    return {
        "post": {
            "summary": summary,
            "description": description,
            "operationId": operation_id,
            "parameters": [_parameter(name, schema) for name, schema in QUERY_SCHEMA["properties"].items()],
            "requestBody": {"required": True, "content": _content(body)},
            "responses": {"200": good} | {str(status): problem for status, problem in problems(*codes).items()},
        }
    }


def _parameter(name: str, schema: Schemas) -> Schemas:
    shown = {key: value for key, value in schema.items() if value is not None}  # a query has no way to say null
    return {"name": name, "in": "query", "required": False, "schema": shown, "description": schema["description"]}


def _content(schemas: Schemas) -> Schemas:
    return {media_type: {"schema": schema} for media_type, schema in schemas.items()}


def _ref(name: str) -> Schemas:
    return {"$ref": REFERENCE.format(model=name)}


DETECTION = {
    DETECT: _post(
        "detect_detect_post",
        "Detect objects in one image",
        "Takes one image and returns its detections, as JSON or drawn onto the image.",
        body={
            "multipart/form-data": _form(BINARY),
            "image/*": BINARY,
            "application/octet-stream": BINARY,
            "application/json": BASE64,
        },
        answer={"application/json": _ref("Answer"), "image/png": BINARY, "image/jpeg": BINARY},
        codes=ONE_IMAGE,
    ),
    DETECT_BATCH: _post(
        "detect_batch_detect_batch_post",
        f"Detect objects in up to {MAX_BATCH_IMAGES} images",
        f"Takes up to {MAX_BATCH_IMAGES} images and returns an answer or a problem for each.",
        body={"multipart/form-data": _form(IMAGES)},
        answer={"application/json": _ref("BatchAnswer")},
        codes=UPLOAD,
    ),
    HUGGING_FACE: _post(
        "hugging_face_post",
        "Detect objects in one image, in Hugging Face's form",
        "Takes the request of huggingface_hub's `object_detection`, and returns the bare list of detections.",
        body={
            "multipart/form-data": _form(BINARY),
            "image/*": BINARY,
            "application/octet-stream": BINARY,
            "application/json": HUGGING_FACE_JSON,
        },
        answer={"application/json": {"type": "array", "items": _ref("Detection")}},
        codes=ONE_IMAGE,
    )
    | {
        "get": {
            "summary": "The playground",
            "description": "Returns a page to try the detector by hand, or the service's name and links as JSON.",
            "operationId": "playground_get",
            "responses": {
                "200": {"description": "Successful Response", "content": _content(INDEX)},
                **{str(status): problem for status, problem in problems(*EVERYWHERE).items()},
            },
        }
    },
}
"""The document's entries for the paths that detect."""
