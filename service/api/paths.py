"""The served paths, in groups. `route_of` gives a path's label in metrics and logs."""

import re

DETECT, DETECT_BATCH, HUGGING_FACE = "/detect", "/detect/batch", "/"
OPEN_INFERENCE = "/v2"
OPEN_INFERENCE_LIVE, OPEN_INFERENCE_READY = "/v2/health/live", "/v2/health/ready"
OPEN_INFERENCE_MODEL = "/v2/models/{name}"
INFER = "/v2/models/{name}/infer"
VERSION = "/versions/{version}"
"""Optional part of a path, after a model's name."""

DETECTION_ROUTES = (DETECT, DETECT_BATCH, HUGGING_FACE, INFER)
"""Routes whose POST detects."""
OPEN_PATHS = ("/healthz", "/readyz", OPEN_INFERENCE_LIVE, OPEN_INFERENCE_READY)
"""Paths that need no key."""
QUIET_PATHS = (*OPEN_PATHS, "/metrics")
"""Paths that are logged at debug level while they answer 200."""

_OF_A_MODEL = re.compile(r"/v2/models/[^/]+(?:/versions/[^/]+)?(/infer|/ready)?")


def route_of(path: str) -> str:
    """Return the template of this path; most paths are their own template."""
    found = _OF_A_MODEL.fullmatch(path)
    return OPEN_INFERENCE_MODEL + (found[1] or "") if found else path


def speaks_open_inference(path: str) -> bool:
    """Tell whether the path's clients read errors in the form of the Open Inference Protocol."""
    return path == OPEN_INFERENCE or path.startswith(f"{OPEN_INFERENCE}/")
