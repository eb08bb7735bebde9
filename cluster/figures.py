"""The most important metrics of a replica, as metrics of Ray, which distinguishes replicas.

`GET /metrics` shows one replica, which Ray's proxy picks. Ray exports these metrics on the metrics port of each node,
as `ray_retinaserve_…` with the labels `application`, `deployment` and `replica`; counters end in `_total`.
"""

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample
from ray.serve.metrics import Counter, Gauge

FIGURES = (
    "retinaserve_requests",
    "retinaserve_request_duration_seconds",
    "retinaserve_images",
    "retinaserve_queue_depth",
    "retinaserve_queue_capacity",
    "retinaserve_ready",
    "retinaserve_model_reloads",
    "retinaserve_device_errors",
)
"""Names of metric families in `service.metrics`."""


class KeyFigures:
    """Ray's copies of the `FIGURES` of a registry. Make it on the replica."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._copies: dict[str, Counter | Gauge] = {}
        self._counted: dict[tuple[str, ...], float] = {}
        """Counts already reported, by metric name and label values."""

    def report(self) -> None:
        """Report the changes to Ray."""
        for family in self._registry.collect():
            if family.name in FIGURES:
                for sample in family.samples:
                    self._hand_on(family, sample)

    def _hand_on(self, family: Metric, sample: Sample) -> None:
        name = sample.name.removesuffix("_total")
        if name not in self._copies:
            kind = Gauge if family.type == "gauge" else Counter
            self._copies[name] = kind(name, family.documentation, tuple(sample.labels))
        if family.type == "gauge":
            self._copies[name].set(sample.value, dict(sample.labels))
            return
        key = (name, *sample.labels.values())
        if (more := sample.value - self._counted.get(key, 0)) > 0:  # Ray refuses to count nothing
            self._copies[name].inc(more, dict(sample.labels))
            self._counted[key] = sample.value
