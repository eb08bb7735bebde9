"""Draws the Grafana dashboard, one screen: python docker/grafana/dashboard.py > docker/grafana/retinaserve.json

Edit this list, not the JSON. Queries go to the records of docker/prometheus/rules.yml where one exists.
"""

import json
import sys
from dataclasses import dataclass
from typing import Any, Literal

DATASOURCE = {"type": "prometheus", "uid": "prometheus"}


@dataclass(frozen=True)
class Query:
    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    title: str
    queries: tuple[Query, ...]
    unit: str
    width: int
    kind: Literal["stat", "timeseries"] = "timeseries"
    warn: float | None = None
    """The value at which it turns orange; red at twice that."""
    maximum: float | None = None
    stacked: bool = False
    text: Literal["value", "name"] = "value"
    says: str = ""


def percentiles(record: str) -> tuple[Query, ...]:
    return tuple(Query(f"{record}:p{share}_1m", f"p{share}") for share in (50, 95, 99))


STATS = (
    Panel("Replicas ready", (Query("job:retinaserve_replicas:ready", ""),), "none", 3, "stat"),
    Panel("Requests per second", (Query("sum(outcome:retinaserve_requests:rate1m)", ""),), "reqps", 4, "stat"),
    Panel(
        "Failed on our side, 5 min",
        (Query("job:retinaserve_request_errors:ratio5m", ""),),
        "percentunit",
        4,
        "stat",
        warn=0.001,
    ),
    Panel("p99, 1 min", (Query("job:retinaserve_request_duration_seconds:p99_1m", ""),), "s", 3, "stat", warn=1),
    Panel(
        "Fullest queue", (Query("max(instance:retinaserve_queue:saturation)", ""),), "percentunit", 3, "stat", warn=0.5
    ),
    Panel(
        "Model and provider",
        (
            Query(
                "label_replace(count by (name, sha256, precision, provider) (retinaserve_model_info), "
                '"hash", "$1", "sha256", "(.{12}).*")',
                "{{name}} {{hash}} {{precision}} {{provider}}",
            ),
        ),
        "none",
        7,
        "stat",
        text="name",
    ),
)
TRAFFIC = (
    Panel(
        "Requests by outcome", (Query("outcome:retinaserve_requests:rate1m", "{{outcome}}"),), "reqps", 8, stacked=True
    ),
    Panel(
        "Failed on our side",
        (
            Query("job:retinaserve_request_errors:ratio5m", "5 min"),
            Query("job:retinaserve_request_errors:ratio1h", "1 h"),
            Query("14.4 * (1 - job:retinaserve_objective:ratio)", "pages above, in both"),
        ),
        "percentunit",
        8,
    ),
    Panel("HTTP answers", (Query("sum by (status) (rate(http_requests_total[1m]))", "{{status}}"),), "reqps", 8),
)
LATENCY = (
    Panel("Latency of requests", percentiles("job:retinaserve_request_duration_seconds"), "s", 8),
    Panel("Latency by stage, p95", (Query("stage:retinaserve_stage_duration_seconds:p95_1m", "{{stage}}"),), "s", 8),
    Panel(
        "Saturation",
        (
            Query("instance:retinaserve_queue:saturation", "queue {{instance}}"),
            Query("instance:retinaserve_device_busy:ratio1m", "device {{instance}}"),
        ),
        "percentunit",
        8,
        maximum=1,
        says="queue: share of the places taken. device: share of the time that it computes.",
    ),
)
MACHINE = (
    Panel("Images per batch", (Query("instance:retinaserve_batch_size:mean1m", "{{instance}}"),), "none", 5),
    Panel("Images per second", (Query("rate(retinaserve_images_total[1m])", "{{instance}}"),), "none", 5),
    Panel(
        "Trouble",
        (
            Query("sum(retinaserve_provider_fallback)", "replicas fallen back to the CPU"),
            Query("sum(retinaserve_model_wanted_differs)", "replicas that cannot load the model that is wanted"),
            Query("sum(increase(retinaserve_device_errors_total[5m]))", "device errors, 5 min"),
        ),
        "none",
        6,
    ),
    Panel(
        "GPU memory",
        (Query("instance:retinaserve_gpu_memory:ratio", "{{instance}} GPU {{gpu}}"),),
        "percentunit",
        4,
        maximum=1,
    ),
    Panel(
        "GPU use",
        (Query("retinaserve_gpu_utilization_ratio", "{{instance}} GPU {{gpu}}"),),
        "percentunit",
        4,
        maximum=1,
    ),
)
ROWS = ((3, STATS), (7, TRAFFIC), (7, LATENCY), (7, MACHINE))


def render_panel(panel: Panel, identifier: int, x: int, y: int, height: int) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.warn is not None:
        steps += [{"color": "orange", "value": panel.warn}, {"color": "red", "value": 2 * panel.warn}]
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    if panel.stacked:
        defaults["custom"] = {"stacking": {"mode": "normal"}, "fillOpacity": 40}
    if panel.kind == "stat":
        options: dict[str, Any] = {"textMode": panel.text, "reduceOptions": {"calcs": ["lastNotNull"]}}
    else:
        options = {"legend": {"placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
    return {
        "id": identifier,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.says,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": height},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": DATASOURCE, "expr": query.expr, "legendFormat": query.legend}
            for index, query in enumerate(panel.queries)
        ],
    }


def render() -> dict[str, Any]:
    """The dashboard in Grafana's JSON model."""
    panels: list[dict[str, Any]] = []
    y = 0
    for height, row in ROWS:
        x = 0
        for panel in row:
            panels.append(render_panel(panel, len(panels) + 1, x, y, height))
            x += panel.width
        y += height
    return {
        "uid": "retinaserve",
        "title": "retinaserve",
        "schemaVersion": 39,
        "time": {"from": "now-30m", "to": "now"},
        "refresh": "5s",
        "panels": panels,
    }


if __name__ == "__main__":
    json.dump(render(), sys.stdout, indent=1)
    print()
