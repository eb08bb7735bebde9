"""An inference request of the protocol: its JSON, and the pictures in it or in the binary data behind it.

    {"id": "a", "inputs": [{"name": "image", "datatype": "BYTES", "shape": [2], "data": ["<base64>", "<base64>"]}],
     "outputs": [{"name": "boxes", "parameters": {"binary_data": true}}], "parameters": {"score_threshold": 0.5}}

With binary data the input has the parameter binary_data_size instead of `data`, and the header
Inference-Header-Content-Length says where the JSON ends. All sizes are checked before the data that they describe has
come. `Wanted` holds the options.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.api.body.large_json import MAX_SMALL_BYTES, parse_json
from service.api.errors import InvalidParameter
from service.api.openinference.pictures import BinaryPictures, Limits, PictureTensor, pictures_in_json
from service.api.openinference.tensors import OUTPUTS
from service.api.uploads import MalformedRequest

FOREIGN = frozenset({"priority", "sequence_id", "sequence_start", "sequence_end"})
"""Parameters that clients send by themselves, and that have no effect here."""
NOT_OFFERED = ("shared_memory_region", "classification")
MICROSECONDS = 1e6
_DECIMAL = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True)
class Wanted:
    """Options of a request."""

    outputs: Mapping[str, bool]
    """Names of the wanted outputs, in order, and whether each is to be binary."""
    parameters: Mapping[str, Any]
    """Detection options by the names of /detect's query."""
    timeout_seconds: float
    """The client's own timeout; inf: none is given."""
    id: str | None


InferRequest = tuple[Wanted, list[bytearray]]
"""A request's options and its encoded pictures, at least one."""


class InferBody:
    """A body being parsed; a `Form` of service.api.uploads.

    Raises MalformedRequest, BodyTooLarge, TooManyPixels, InvalidImage, InvalidParameter.
    """

    def __init__(self, json_bytes: int | None, limits: Limits) -> None:
        """Begin a body. `json_bytes` is the Inference-Header-Content-Length; None: there is no binary data."""
        self._json_bytes = json_bytes
        self._limits = limits
        self._json = bytearray()
        self._head: tuple[Wanted, PictureTensor] | None = None
        self._binary: BinaryPictures | None = None

    @property
    def takes_long(self) -> bool:
        return self._binary is None

    def feed(self, chunk: bytes) -> None:
        missing = len(chunk) if self._json_bytes is None else self._json_bytes - len(self._json)
        self._json += chunk[:missing]
        data = chunk[missing:]
        if len(self._json) == self._json_bytes and self._head is None and len(self._json) <= MAX_SMALL_BYTES:
            self._head = head_of(self._json, self._limits)
            _, tensor = self._head
            self._binary = None if tensor.binary_bytes is None else BinaryPictures(tensor)
        if self._binary is not None:
            self._binary.feed(data)
        elif data and self._head is None:
            raise MalformedRequest(f"the JSON has more than {MAX_SMALL_BYTES} bytes before binary data")
        elif data:
            raise MalformedRequest("binary data comes behind the JSON, but the input has no binary_data_size")

    def finish(self) -> InferRequest:
        if self._json_bytes is not None and len(self._json) != self._json_bytes:
            raise MalformedRequest("the body ends before its JSON does")
        wanted, tensor = self._head or head_of(self._json, self._limits)
        if self._binary is not None:
            return wanted, self._binary.finish()
        if tensor.binary_bytes is not None:
            raise MalformedRequest("binary_data_size is given, but Inference-Header-Content-Length is not")
        return wanted, pictures_in_json(tensor)


def json_bytes_of(header: str | None) -> int | None:
    """Read Inference-Header-Content-Length. MalformedRequest: it is not a number."""
    if header is None:
        return None
    if _DECIMAL.fullmatch(header) is None:
        raise MalformedRequest("Inference-Header-Content-Length is not the number of bytes of the JSON")
    return int(header)


def head_of(json: bytearray, limits: Limits) -> tuple[Wanted, PictureTensor]:
    """Read the JSON, without its tensor's data, and check it against the limits."""
    try:
        document = parse_json(json)
    except (ValueError, RecursionError) as error:
        raise MalformedRequest(f"the body is not JSON that is read here: {error}") from error
    if not isinstance(document, dict):
        raise MalformedRequest("the body is not a JSON object with inputs")
    given = document.get("inputs")
    if not isinstance(given, list) or len(given) != 1 or not isinstance(given[0], dict):
        raise MalformedRequest("the request has not exactly one input, 'image'")
    options = member(given[0], "parameters")
    _refuse_what_is_not_offered(options)
    return _wanted(document), PictureTensor.read(given[0], options.get("binary_data_size"), limits)


def _wanted(document: dict[str, Any]) -> Wanted:
    parameters, request_id = member(document, "parameters"), document.get("id")
    if not isinstance(request_id, str | None):
        raise MalformedRequest("the request's id is not a string")
    binary = _flag(parameters, "binary_data_output", False)
    seconds = _timeout_seconds(parameters.get("timeout"))
    own = FOREIGN | {"binary_data_output", "timeout"}
    options = {name: _option(name, value) for name, value in parameters.items() if name not in own}
    return Wanted(_outputs(document.get("outputs"), binary), options, seconds, request_id)


def _outputs(given: Any, binary: bool) -> Mapping[str, bool]:
    """Name the wanted outputs; all if the request names none."""
    if not given:
        return dict.fromkeys(OUTPUTS, binary)
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        raise MalformedRequest("the outputs are not a list of objects")
    outputs: dict[str, bool] = {}
    for each in given:
        name, options = each.get("name"), member(each, "parameters")
        if not isinstance(name, str) or name not in OUTPUTS or name in outputs:
            raise MalformedRequest(
                f"the output {name!r:.100} is not one of {', '.join(OUTPUTS)}, or is asked for twice"
            )
        _refuse_what_is_not_offered(options)
        outputs[name] = _flag(options, "binary_data", binary)
    return outputs


def _option(name: str, value: Any) -> Any:
    """Convert a parameter to a query's form, in which labels are a list."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InvalidParameter(f"{name}: a parameter is a number or a string, not {value!r:.100}")
    return [each.strip() for each in value.split(",")] if name == "label" and isinstance(value, str) else value


def _timeout_seconds(microseconds: Any) -> float:
    if not microseconds:
        return math.inf
    if isinstance(microseconds, bool) or not isinstance(microseconds, int) or microseconds < 0:
        raise InvalidParameter(f"timeout: a whole number of microseconds, not {microseconds!r:.100}")
    return microseconds / MICROSECONDS


def _flag(options: Mapping[str, Any], name: str, default: bool) -> bool:
    value = options.get(name, default)
    if not isinstance(value, bool):
        raise MalformedRequest(f"{name} is {value!r:.100}; it should be true or false")
    return value


def member(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a member that is an object; empty if it is null or missing."""
    value = given.get(name)
    if not isinstance(value, dict | None):
        raise MalformedRequest(f"{name} is not an object")
    return value or {}


def _refuse_what_is_not_offered(options: Mapping[str, Any]) -> None:
    for name in NOT_OFFERED:
        if options.get(name):
            raise MalformedRequest(f"{name} is not offered here")
