"""All Prometheus metrics: one registry, base units, closed label sets, every series present from the start.

`route` is the template ("/detect"), or "<unmatched>" for an unknown path. A method that the route lacks is "<other>";
HEAD counts as GET. A status that any request can get, such as 414, has "<other>" and "<unmatched>". A histogram has
buckets if an alert or the dashboard reads them, else only its sum and count. Stage and request durations are those of
answered images and requests.
"""

import socket
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    Summary,
    disable_created_metrics,
    generate_latest,
)

disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the series, and no query of ours reads them

NAMESPACE = "retinaserve"
STAGES = ("read", "decode", "preprocess", "queue", "inference", "postprocess", "encode")
Outcome = Literal[
    "ok", "invalid", "too_large", "unsupported", "overloaded", "timeout", "cancelled", "unavailable", "error"
]
DEVICE_ERROR_KINDS = ("oom", "cuda", "other")
KILL_REASONS = ("deadline", "cancelled", "cpu", "died")
RELOAD_OUTCOMES = ("success", "failure")
OTHER_METHOD = "<other>"
UNMATCHED = "<unmatched>"

STAGE_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 2)
REQUEST_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class HttpMetrics:
    """Metrics of every request, whatever its route."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ["method", "route"]
        self.requests = Counter("http_requests_total", "HTTP requests.", [*labels, "status"], registry=registry)
        duration = "Time from a detection request's headers to its answer."
        self.duration = Summary("http_request_duration_seconds", duration, labels, registry=registry)
        self._known: set[tuple[str, str, int]] = set()
        """Method, route and status of each series."""
        self._timed: set[tuple[str, str]] = set()
        self.in_flight = Gauge("http_requests_in_flight", "HTTP requests being answered.", registry=registry)
        size = "Bytes of detection requests' bodies."
        self.request_size = Summary("http_request_size_bytes", size, registry=registry)

    def make_series(self, method: str, route: str, statuses: Iterable[int], *, timed: bool = False) -> None:
        """Create the series of a route's method: one for each status and, if `timed`, its durations."""
        if timed:
            self._timed.add((method, route))
            self.duration.labels(method, route)
        for status in sorted(statuses):
            self._known.add((method, route, status))
            self.requests.labels(method, route, str(status))

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        method = "GET" if method == "HEAD" else method
        places = ((method, route), (OTHER_METHOD, route), (OTHER_METHOD, UNMATCHED))
        place = next((place for place in places if (*place, status) in self._known), places[-1])
        self.requests.labels(*place, str(status)).inc()
        if place in self._timed:
            self.duration.labels(*place).observe(seconds)


class DecoderMetrics:
    """Metrics of the child processes that decode and draw."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.processes = Gauge("decoder_processes", "Decoders alive.", namespace=NAMESPACE, registry=registry)
        self.kills = Counter(
            "decoder_kills_total",
            "Decoders that were killed, or died.",
            ["reason"],
            namespace=NAMESPACE,
            registry=registry,
        )


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        counter = partial(Counter, namespace=NAMESPACE, registry=registry)
        gauge = partial(Gauge, namespace=NAMESPACE, registry=registry)
        histogram = partial(Histogram, namespace=NAMESPACE, registry=registry)
        summary = partial(Summary, namespace=NAMESPACE, registry=registry)
        info = partial(Info, namespace=NAMESPACE, registry=registry)

        self.requests = counter("requests_total", "Detection requests; a batch counts once.", ["outcome"])
        self.stage_duration = histogram(
            "stage_duration_seconds",
            "Time of an answered image in each stage.",
            ["stage"],
            buckets=STAGE_SECONDS,
        )
        self._stage_durations = {stage: self.stage_duration.labels(stage) for stage in STAGES}
        self.request_duration = histogram(
            "request_duration_seconds",
            "Time from a request to its encoded answer, for answered requests.",
            buckets=REQUEST_SECONDS,
        )
        self.batch_size = summary("batch_size", "Images in each run of the device.")
        self.images = counter("images_total", "Images answered with detections.")
        self.detections = counter("detections_total", "Detections in answers.")
        self.image_pixels = summary("image_pixels", "Pixels of each image answered.")
        self.detections_per_image = summary("detections_per_image", "Detections of each image answered.")

        self.queue_depth = gauge("queue_depth", "Images that hold a place: admitted and not yet run.")
        self.queue_capacity = gauge("queue_capacity", "Places of the queue; more images get 429.")
        self.upload_bytes_in_flight = gauge("upload_bytes_in_flight", "Bytes of bodies that have begun to arrive.")
        self.requests_running = gauge("requests_running", "Images on the device now.")

        self.model_info = info("model", "The model that serves.")
        info("build", "The program that serves, and where: the container's id or the pod's name.").info(
            {"version": program_version(), "replica": socket.gethostname()}
        )
        self.ready = gauge("ready", "1 while /readyz answers 200.")
        self.provider_fallback = gauge("provider_fallback", "1 if a GPU was wanted and the CPU computes.")
        self.model_load_seconds = gauge("model_load_seconds", "Time to open and verify the model that serves.")
        self.model_wanted_differs = gauge(
            "model_wanted_differs", "1 while the model that serves is not the wanted file."
        )
        self.warmup_seconds = gauge("warmup_seconds", "Time to warm up the model that serves.")
        self.model_reloads = counter("model_reloads_total", "Reloads of the model.", ["outcome"])
        self.device_errors = counter("device_errors_total", "Runs that failed.", ["kind"])

        self.decoders = DecoderMetrics(registry)
        self.http = HttpMetrics(registry)
        self._make_series()

    def _make_series(self) -> None:
        """Make the series of every label value, so that rates begin at zero, and the process's own series."""
        for metric, values in (
            (self.requests, get_args(Outcome)),
            (self.model_reloads, RELOAD_OUTCOMES),
            (self.device_errors, DEVICE_ERROR_KINDS),
            (self.decoders.kills, KILL_REASONS),
        ):
            for value in values:
                metric.labels(value)
        for collector in (ProcessCollector, PlatformCollector):
            collector(registry=self.registry)

    def watch_queue(self, depth: Callable[[], float], running: Callable[[], float], capacity: int) -> None:
        """Read the queue's gauges from these functions at each scrape."""
        self.queue_depth.set_function(depth)
        self.requests_running.set_function(running)
        self.queue_capacity.set(capacity)

    def observe_image(self, stages: Mapping[str, float], pixels: int, detections: int) -> None:
        """Count one answered image; `stages` are seconds."""
        for stage, seconds in stages.items():
            self._stage_durations[stage].observe(seconds)
        self.images.inc()
        self.detections.inc(detections)
        self.image_pixels.observe(pixels)
        self.detections_per_image.observe(detections)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def program_version() -> str:
    try:
        return version("retinaserve")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "unknown"
