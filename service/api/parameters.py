"""The options of a request's jobs, made of its query, the settings and the model file."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails
from starlette.datastructures import QueryParams

from model.metadata import MAX_DETECTIONS, NMS_THRESHOLD, SCORE_THRESHOLD, ModelMetadata
from model.tiles import MAX_OVERLAP, MAX_TILE, MIN_TILE, OVERLAP, Tiling
from service.api.errors import InvalidParameter
from service.api.schemas import Strict, Thresholds
from service.config import OPTION_TEXTS, DetectionCount, Settings, Share
from service.core.job import Options
from service.core.store import LoadedModel

SHOWN_LABELS = 20
SHOWN_CHARACTERS = 200
"""Characters that an error shows of an invalid value."""

Value = TypeVar("Value", int, float)


def _text(name: str, default: float) -> str:
    text = OPTION_TEXTS[name]
    return f"{text[0].upper()}{text[1:]}. [{default}]"


class DetectQuery(Strict):
    """A detection's query. It overrides the server's settings, which override the model file."""

    score_threshold: Share | None = Field(None, description=_text("score_threshold", SCORE_THRESHOLD))
    nms_threshold: Share | None = Field(None, description=_text("nms_threshold", NMS_THRESHOLD))
    max_detections: DetectionCount | None = Field(None, description=_text("max_detections", MAX_DETECTIONS))
    label: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="Keep only this label; repeat it for several."
    )
    tile: Annotated[int, Field(ge=MIN_TILE, le=MAX_TILE)] | None = Field(
        None, description="Detect in windows of this side too, picture pixels, for small objects. [none]"
    )
    overlap: Annotated[float, Field(ge=0, le=MAX_OVERLAP, allow_inf_nan=False)] | None = Field(
        None, description=f"Share of a window that its neighbour has too; only with `tile`. [{OVERLAP}]"
    )


def read_query(parameters: QueryParams) -> DetectQuery:
    """Read the query; the last of repeated values counts. InvalidParameter: correct the query."""
    values: dict[str, Any] = dict(parameters)
    if "label" in values:
        values["label"] = parameters.getlist("label")
    return _checked(values)


def with_parameters(query: DetectQuery, parameters: Mapping[str, Any], *, strict: bool = False) -> DetectQuery:
    """Override the query by the body's parameters. InvalidParameter: correct the body.

    strict  refuse numbers that are text
    """
    return _checked(query.model_dump(exclude_unset=True) | dict(parameters), strict=strict)


def _checked(values: Mapping[str, Any], *, strict: bool = False) -> DetectQuery:
    try:
        return DetectQuery.model_validate(values, strict=strict)
    except ValidationError as error:
        raise InvalidParameter("; ".join(map(_explain, error.errors()))) from error


def thresholds(settings: Settings, metadata: ModelMetadata) -> Thresholds:
    """Choose the defaults of the query: the settings, then the model file."""
    return Thresholds(
        score_threshold=_first(settings.score_threshold, metadata.score_threshold),
        nms_threshold=_first(settings.nms_threshold, metadata.nms_threshold),
        max_detections=_first(settings.max_detections, metadata.max_detections),
    )


def options(query: DetectQuery, settings: Settings, model: LoadedModel) -> Options:
    """Complete the query. InvalidParameter: the model has no such label."""
    defaults = thresholds(settings, model.detector.metadata)
    unknown = [label for label in query.label if label not in model.label_ids]
    if unknown:
        known = list(model.label_ids)
        more = f" and {len(known) - SHOWN_LABELS} more" if len(known) > SHOWN_LABELS else ""
        raise InvalidParameter(f"label: {unknown[0]!r} is not one of {', '.join(known[:SHOWN_LABELS])}{more}")
    try:
        tiling = Tiling.asked_for(query.tile, query.overlap)
    except ValueError as error:
        raise InvalidParameter(f"overlap: {error}") from error
    return Options(
        score_threshold=_first(query.score_threshold, defaults.score_threshold),
        nms_threshold=_first(query.nms_threshold, defaults.nms_threshold),
        max_detections=_first(query.max_detections, defaults.max_detections),
        label_ids=frozenset(model.label_ids[label] for label in query.label) or None,
        tiling=tiling,
    )


def _first(given: Value | None, default: Value) -> Value:
    return default if given is None else given


def _explain(error: ErrorDetails) -> str:
    name = error["loc"][0]
    if error["type"] == "extra_forbidden":
        return f"{name}: there is no such parameter; there are {', '.join(DetectQuery.model_fields)}"
    shown = repr(error["input"])
    return f"{name}: {error['msg']}, not {shown[:SHOWN_CHARACTERS]}{'…' * (len(shown) > SHOWN_CHARACTERS)}"
