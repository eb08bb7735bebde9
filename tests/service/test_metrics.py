"""Every series from the start, and the truth in them."""

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from typing import get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import DEVICE_ERROR_KINDS, RELOAD_OUTCOMES, STAGES, Outcome
from tests.support.load import PNG
from tests.support.serving import FakeDetector, Serving, picture, serving


@pytest.fixture
def server() -> Iterator[Serving]:
    with serving(FakeDetector()) as running:
        yield running


def series(server: Serving) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    text = server.client.get("/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_label_value_is_there_before_the_first_request(server: Serving) -> None:
    there = series(server)
    assert {("retinaserve_requests_total", (("outcome", value),)) for value in get_args(Outcome)} <= there
    assert {("retinaserve_stage_duration_seconds_count", (("stage", value),)) for value in STAGES} <= there
    assert {("retinaserve_device_errors_total", (("kind", value),)) for value in DEVICE_ERROR_KINDS} <= there
    assert {("retinaserve_model_reloads_total", (("outcome", value),)) for value in RELOAD_OUTCOMES} <= there
    for name in (
        "request_duration_seconds_count", "batch_size_count", "queue_depth", "queue_capacity", "images_total",
        "detections_total", "ready", "provider_fallback", "requests_running", "image_pixels_count",
        "detections_per_image_count", "model_load_seconds", "warmup_seconds",
    ):  # fmt: skip
        assert (f"retinaserve_{name}", ()) in there
    assert any(name == "retinaserve_model_info" and ("name", "fake") in labels for name, labels in there)
    assert any(name == "process_resident_memory_bytes" for name, _ in there)


def test_no_request_whatever_makes_a_new_series(server: Serving) -> None:
    before = series(server)
    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "FROBNICATE", "TRACE"):
        for path in (
            "/",
            "/a/b/c",
            "/detect/x",
            "/detect",
            "/detect/batch",
            "/model",
            "/metrics",
            "/healthz",
            "/docs",
            "/v2",
            "/v2/x",
            "/v2/health/live",
            "/v2/models/fake",
            "/v2/models/fake/ready",
            "/v2/models/x/versions/1",
        ):
            server.client.request(method, path)
    server.client.get("/playground/example.jpg")
    server.client.post("/detect", content=picture(), headers=PNG)
    server.client.post("/detect", content=b"x", headers=PNG)
    assert series(server) == before


def test_the_series_are_few(server: Serving) -> None:
    there = series(server)
    by_route = Counter(dict(labels)["route"] for name, labels in there if name == "http_requests_total")
    assert max(by_route.values()) <= 16
    assert len(there) - by_route.total() < 135


def test_with_keys_and_origins_no_request_makes_a_new_series_either() -> None:
    with serving(FakeDetector(), api_keys="a,b", cors_origins="https://a.example") as server:
        server.client.headers["X-API-Key"] = "a"
        before = series(server)
        for key in ("a", "none"):
            for path in ("/nothing", "/detect", "/detect/batch", "/model", "/metrics", "/healthz", "/docs"):
                for method in ("GET", "HEAD", "POST", "PUT", "OPTIONS"):
                    preflight = {"Origin": f"https://{key}.example", "Access-Control-Request-Method": "GET"}
                    server.client.request(method, path, headers={"X-API-Key": key} | preflight)
        assert series(server) == before


def test_head_counts_as_get(server: Serving) -> None:
    server.client.head("/model")
    assert server.metric("http_requests_total", method="GET", route="/model", status="200") == 1


def test_what_any_request_can_get_counts_without_its_route(server: Serving) -> None:
    assert server.client.get("/model?" + "x" * 9000).status_code == 414
    assert server.metric("http_requests_total", method="<other>", route="<unmatched>", status="414") == 1


def test_a_method_that_a_route_has_not_counts_as_other(server: Serving) -> None:
    for method in ("GET", "PUT", "DELETE"):
        server.client.request(method, "/detect")
    assert server.metric("http_requests_total", method="<other>", route="/detect", status="405") == 3


def test_metrics_are_compressed_when_that_is_asked_for(server: Serving) -> None:
    plain = server.client.get("/metrics", headers={"Accept-Encoding": "identity"})
    packed = server.client.get("/metrics", headers={"Accept-Encoding": "gzip"})
    assert "Content-Encoding" not in plain.headers
    assert (packed.headers["Content-Encoding"], packed.headers["Vary"]) == ("gzip", "Accept-Encoding")
    assert int(packed.headers["Content-Length"]) < len(plain.content) / 4
    assert packed.text.splitlines()[0] == plain.text.splitlines()[0]


def test_an_answered_request_is_counted_once_in_every_place(server: Serving) -> None:
    for _ in range(3):
        server.client.post("/detect", content=picture(), headers=PNG)
    assert server.metric("retinaserve_requests_total", outcome="ok") == 3
    assert server.metric("retinaserve_images_total") == server.metric("retinaserve_detections_total") == 3
    assert server.metric("retinaserve_batch_size_sum") == 3
    assert server.metric("http_requests_total", method="POST", route="/detect", status="200") == 3
    for stage in STAGES:
        assert server.metric("retinaserve_stage_duration_seconds_count", stage=stage) == 3


def test_the_stages_sum_to_the_request_duration(server: Serving) -> None:
    for _ in range(3):
        server.client.post("/detect", content=picture(), headers=PNG)
    stages = sum(server.metric("retinaserve_stage_duration_seconds_sum", stage=stage) for stage in STAGES)
    assert stages == pytest.approx(server.metric("retinaserve_request_duration_seconds_sum"))


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_promtool_finds_no_fault(server: Serving) -> None:
    text = server.client.get("/metrics").content
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
