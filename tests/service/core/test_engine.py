"""Load, faults and departures, over real sockets, around a detector that is slow or fails when told."""

import contextlib
import json
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPResponse
from pathlib import Path

import httpx
import pytest

from model.detector import Detector, InferenceFailed
from model.types import CanvasImage
from tests.support.load import connected, request_head
from tests.support.serving import PNG, FakeDetector, Serving, detect, picture, serving
from tests.support.tiny_model import write_tiny_model


def in_background(count: int, call: Callable[[], httpx.Response]) -> list["Future[httpx.Response]"]:
    pool = ThreadPoolExecutor(count)
    return [pool.submit(call) for _ in range(count)]


def send_image(connection: socket.socket, image: bytes, but_last_bytes: int = 0) -> None:
    whole = request_head(len(image)) + image
    connection.sendall(whole[: len(whole) - but_last_bytes])


def failure(kind: str, fatal: bool = False) -> InferenceFailed:
    error = InferenceFailed(f"made to fail: {kind}")
    error.kind, error.fatal = kind, fatal  # type: ignore[assignment]
    return error


def outcomes(server: Serving) -> dict[str, float]:
    names = ("ok", "invalid", "overloaded", "timeout", "cancelled", "unavailable", "error")
    return {name: server.metric("retinaserve_requests_total", outcome=name) for name in names}


def test_beyond_the_places_requests_get_429_and_the_counts_are_exact() -> None:
    with serving(detector := FakeDetector(), queue_capacity=4) as server:
        detector.gate.clear()
        answers = in_background(20, lambda: detect(server))
        server.wait_until(lambda: outcomes(server)["overloaded"] == 16)
        assert server.metric("retinaserve_queue_depth") == server.metric("retinaserve_queue_capacity") == 4
        for path in ("/healthz", "/readyz", "/metrics"):
            assert server.client.get(path).status_code == 200
        detector.gate.set()
        statuses = [answer.result().status_code for answer in answers]
        assert (statuses.count(200), statuses.count(429)) == (4, 16)
        refused = next(answer.result() for answer in answers if answer.result().status_code == 429)
        assert refused.json()["code"] == "overloaded" and int(refused.headers["retry-after"]) >= 1
        assert outcomes(server) | {"ok": 4, "overloaded": 16} == outcomes(server)
        server.wait_until(lambda: server.metric("retinaserve_queue_depth") == 0)


@pytest.mark.parametrize("arrives", ["at once", "in two parts"])
def test_a_refused_client_can_use_its_connection_again(arrives: str) -> None:
    """The client may be refused before its body has come or after."""
    with serving(detector := FakeDetector(), queue_capacity=1) as server:
        detector.gate.clear()
        [first] = in_background(1, lambda: detect(server))
        server.wait_until(lambda: server.metric("retinaserve_requests_running") == 1)
        with connected(server.url) as connection:
            for count in (1, 2):
                later = 10 if arrives == "in two parts" else 0
                send_image(connection, picture(), but_last_bytes=later)
                if later:
                    server.wait_until(lambda: server.metric("http_requests_in_flight") == 2)
                    connection.sendall(picture()[-later:])
                with HTTPResponse(connection) as answer:
                    answer.begin()
                    answer.read()
                assert (answer.status, answer.will_close) == (429, False)
                server.wait_until(lambda count=count: outcomes(server)["overloaded"] == count)  # type: ignore[misc]
        detector.gate.set()
        assert first.result().status_code == 200
        assert detector.batches == [1]


def test_without_a_key_a_client_is_told_so_and_not_that_the_queue_is_full() -> None:
    with serving(detector := FakeDetector(), queue_capacity=1, api_keys="k") as server:
        server.client.headers["X-API-Key"] = "k"
        detector.gate.clear()
        [first] = in_background(1, lambda: detect(server))
        server.wait_until(lambda: server.metric("retinaserve_requests_running") == 1)
        assert detect(server).status_code == 429
        assert httpx.post(server.url + "/detect", content=picture(), headers=PNG).status_code == 401
        detector.gate.set()
        assert first.result().status_code == 200


def test_a_batch_gets_all_its_places_or_429() -> None:
    with serving(detector := FakeDetector(), queue_capacity=4) as server:
        detector.gate.clear()
        waiting = in_background(2, lambda: detect(server))
        server.wait_until(lambda: server.metric("retinaserve_queue_depth") == 2)
        files = [("image", picture())] * 3
        assert server.client.post("/detect/batch", files=files).status_code == 429
        assert server.metric("retinaserve_queue_depth") == 2
        detector.gate.set()
        assert [answer.result().status_code for answer in waiting] == [200, 200]
        assert server.client.post("/detect/batch", files=files).status_code == 200
        assert server.client.post("/detect/batch", files=[("image", picture())] * 5).status_code == 400


def test_a_crowd_shares_the_device_and_a_lone_image_does_not() -> None:
    with serving(detector := FakeDetector(seconds=0.01, lanes=2), runs_at_once=2, queue_capacity=20) as server:
        assert detect(server).status_code == 200
        assert detector.shared == [False], "alone"
        for answer in in_background(20, lambda: detect(server)):
            timing = answer.result().json()["timing_ms"]
            assert sum(timing.values()) - timing["total"] == pytest.approx(timing["total"], abs=0.01)
        assert any(detector.shared)
        assert detect(server).status_code == 200
        assert detector.shared[-1] is False, "alone again"


def test_of_a_crowd_only_what_the_device_takes_next_is_decoded() -> None:
    with serving(detector := FakeDetector(), queue_capacity=20) as server:
        line, running, ahead = server.service.engine.line, 1, 2 + 2  # two turns of one, one for each decode thread
        detector.gate.clear()
        answers = in_background(12, lambda: detect(server))
        server.wait_until(lambda: server.metric("retinaserve_queue_depth") == 12)
        server.wait_until(lambda: line.snapshot().ready == ahead)
        assert line.snapshot().encoded == 12 - running - ahead
        with connected(server.url) as leaving:
            send_image(leaving, picture())
            server.wait_until(lambda: server.metric("retinaserve_queue_depth") == 13)
        server.wait_until(lambda: server.metric("retinaserve_queue_depth") == 12)
        assert line.snapshot().ready == ahead, "its place is free, and nothing was done for it"
        detector.gate.set()
        assert [answer.result().status_code for answer in answers] == [200] * 12


def test_clients_that_leave_while_all_that_is_decoded_waits_make_room_for_the_others() -> None:
    with serving(detector := FakeDetector(), queue_capacity=20) as server, contextlib.ExitStack() as stay:
        line = server.service.engine.line
        detector.gate.clear()
        [first] = in_background(1, lambda: detect(server))
        server.wait_until(lambda: server.metric("retinaserve_requests_running") == 1)
        with contextlib.ExitStack() as leave:
            for _ in range(4):
                send_image(leave.enter_context(connected(server.url)), picture())
            server.wait_until(lambda: line.snapshot().ready == 4)
            send_image(stay.enter_context(connected(server.url)), picture())
            server.wait_until(lambda: line.snapshot().encoded == 1)
        server.wait_until(lambda: server.metric("retinaserve_queue_depth") == 2)
        server.wait_until(lambda: line.snapshot().ready == 1)
        detector.gate.set()
        assert first.result().status_code == 200
        server.wait_until(lambda: server.metric("retinaserve_queue_depth") == 0)
        assert len(detector.batches) == 2


def test_a_client_that_leaves_the_queue_is_counted_and_its_image_never_run() -> None:
    with serving(detector := FakeDetector()) as server:
        detector.gate.clear()
        [first] = in_background(1, lambda: detect(server))
        server.wait_until(lambda: server.metric("retinaserve_requests_running") == 1)
        with connected(server.url) as leaving:
            send_image(leaving, picture())
            server.wait_until(lambda: server.service.engine.line.snapshot().ready == 1)
        server.wait_until(lambda: outcomes(server)["cancelled"] == 1)
        assert server.metric("retinaserve_queue_depth") == 1, "its place is free while the device still works"
        detector.gate.set()
        assert first.result().status_code == 200
        assert detector.batches == [1]
        assert server.metric("http_requests_total", method="POST", route="/detect", status="499") == 1


def test_a_client_that_leaves_in_the_middle_of_its_upload_is_counted_and_forgotten() -> None:
    with serving(FakeDetector()) as server:
        with connected(server.url) as leaving:
            send_image(leaving, picture(), but_last_bytes=1)
            server.wait_until(lambda: server.metric("http_requests_in_flight") == 1)
        server.wait_until(lambda: outcomes(server)["cancelled"] == 1)
        assert server.metric("retinaserve_queue_depth") == server.metric("http_requests_in_flight") == 0


def test_past_the_deadline_a_request_gets_504_and_its_work_is_not_done() -> None:
    with serving(detector := FakeDetector(), request_timeout_seconds=1) as server:
        detector.gate.clear()
        answers = in_background(3, lambda: detect(server))
        assert [answer.result().status_code for answer in answers] == [504] * 3
        assert answers[0].result().json()["code"] == "deadline_exceeded"
        assert outcomes(server)["timeout"] == 3
        detector.gate.set()
        server.wait_until(lambda: server.metric("retinaserve_queue_depth") == 0)
        assert detector.batches == [1], "only the one that had begun"
        assert detect(server).status_code == 200


def test_a_late_image_of_a_batch_is_a_problem_in_its_place() -> None:
    widths = [64, 74, 84]
    with serving(detector := FakeDetector(), request_timeout_seconds=2, max_batch_size=1) as server:
        detector.fault = lambda canvases: detector.gate.clear()  # the second run hangs
        files = [("image", picture(width)) for width in widths]
        response = server.client.post("/detect/batch", files=files)
        assert response.status_code == 200
        results = response.json()["results"]
        assert [problem["code"] for problem in results if "code" in problem] == ["deadline_exceeded"] * 2
        [position] = [number for number, result in enumerate(results) if "detections" in result]
        assert results[position]["image"]["width"] == widths[position]  # whichever was decoded first


def test_images_that_waited_share_a_batch_and_each_gets_its_own_answer() -> None:
    """The mean red of each picture is its score; thresholds, labels and sizes differ from neighbour to neighbour."""
    with serving(detector := FakeDetector(), max_batch_size=8, queue_capacity=100) as server:
        detector.gate.clear()
        pool = ThreadPoolExecutor(60)

        def ask(number: int) -> httpx.Response:
            image = picture(64 + 10 * (number % 3), 64, (number * 4, 0, 0))
            query = {"score_threshold": 0.5} if number % 2 else {}
            return detect(server, content=image, headers=PNG, params=query)

        answers = [pool.submit(ask, number) for number in range(60)]
        server.wait_until(lambda: server.metric("retinaserve_queue_depth") == 60)
        detector.gate.set()
        for number, answer in enumerate(answers):
            values = answer.result().json()
            score = number * 4 / 255
            assert values["image"]["width"] == 64 + 10 * (number % 3)
            found = [detection["score"] for detection in values["detections"]]
            assert found == ([pytest.approx(score, abs=1e-6)] if score > (0.5 if number % 2 else 0.05) else [])
        assert max(detector.batches) > 1


def test_one_image_that_fails_does_not_fail_its_neighbours() -> None:
    def fail_on_black(canvases: Sequence[CanvasImage]) -> None:
        if any(canvas.pixels.max() == 0 for canvas in canvases):
            raise failure("other")

    with serving(detector := FakeDetector(fault=fail_on_black), max_batch_size=8) as server:
        detector.gate.clear()
        good = in_background(4, lambda: detect(server))
        bad = in_background(1, lambda: detect(server, content=picture(colour=(0, 0, 0)), headers=PNG))
        server.wait_until(lambda: server.metric("retinaserve_queue_depth") == 5)
        detector.gate.set()
        assert [answer.result().status_code for answer in good] == [200] * 4
        assert bad[0].result().status_code == 500
        problem = bad[0].result().json()
        assert problem["code"] == "inference_failed" and "made to fail" not in json.dumps(problem)
        assert outcomes(server)["error"] == 1
        assert server.client.get("/healthz").status_code == 200


def test_a_real_network_that_raises_fails_that_image_alone(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "faulty.onnx", fail_on_white=True)
    with serving(Detector(tmp_path / "faulty.onnx", device="cpu"), max_batch_size=8) as server:
        for colour, status in (((255, 255, 255), 500), ((9, 99, 199), 200)):
            assert detect(server, content=picture(colour=colour), headers=PNG).status_code == status
        assert server.metric("retinaserve_device_errors_total", kind="other") == 1


@pytest.mark.parametrize("kind", ["oom", "cuda", "other"])
def test_a_failed_run_is_counted_by_its_kind(kind: str) -> None:
    faults = [failure(kind)]

    def fail_once(canvases: Sequence[CanvasImage]) -> None:
        if faults:
            raise faults.pop()

    with serving(FakeDetector(fault=fail_once)) as server:
        assert detect(server).status_code == 500
        assert server.metric("retinaserve_device_errors_total", kind=kind) == 1
        assert detect(server).status_code == 200


def test_an_error_that_nobody_foresaw_is_answered_and_the_device_thread_lives() -> None:
    faults = [ZeroDivisionError("secret")]

    def fail_once(canvases: Sequence[CanvasImage]) -> None:
        if faults:
            raise faults.pop()

    with serving(FakeDetector(fault=fail_once)) as server:
        response = detect(server)
        assert (response.status_code, response.json()["code"]) == (500, "internal_error")
        assert "secret" not in response.text
        assert detect(server).status_code == 200


def test_a_lost_device_fails_the_liveness_probe_and_refuses_requests() -> None:
    def lose(canvases: Sequence[CanvasImage]) -> None:
        raise failure("cuda", fatal=True)

    with serving(FakeDetector(fault=lose)) as server:
        assert detect(server).status_code == 500
        assert server.client.get("/healthz").status_code == server.client.get("/readyz").status_code == 503
        assert server.client.get("/healthz").json()["code"] == "not_ready"
        response = detect(server)
        assert (response.status_code, response.json()["code"]) == (503, "not_ready")
        assert "retry-after" in response.headers
        assert server.metric("retinaserve_ready") == 0


def test_repeated_failures_condemn_the_device_only_if_a_self_test_fails_too() -> None:
    def always(canvases: Sequence[CanvasImage]) -> None:
        raise failure("other")

    def only_red(canvases: Sequence[CanvasImage]) -> None:
        if canvases[0].pixels[0, 0, 0] == 200:
            raise failure("other")

    for fault, status in ((always, 503), (only_red, 200)):
        with serving(FakeDetector(fault=fault)) as server:
            for _ in range(4):
                detect(server)
            assert server.client.get("/healthz").status_code == status


def test_a_run_that_hangs_fails_the_liveness_probe() -> None:
    with serving(detector := FakeDetector(), request_timeout_seconds=0.1) as server:
        detector.gate.clear()
        assert detect(server).status_code == 504
        server.wait_until(lambda: server.client.get("/healthz").status_code == 503)
        assert server.client.get("/readyz").status_code == 503


def test_a_swap_keeps_requests_in_flight_on_the_model_they_began_with() -> None:
    old, new = FakeDetector("old"), FakeDetector("new")
    with serving(old, max_batch_size=8) as server:
        old.gate.clear()
        [waiting] = in_background(1, lambda: detect(server))
        server.wait_until(lambda: server.metric("retinaserve_requests_running") == 1)
        queued = in_background(2, lambda: detect(server))
        server.wait_until(lambda: server.metric("retinaserve_queue_depth") == 3)
        server.models.append(new)
        assert server.service.store.reload()
        [newer] = in_background(1, lambda: detect(server))
        server.wait_until(lambda: server.service.engine.line.snapshot().ready == 3)
        old.gate.set()
        assert newer.result().json()["model"]["name"] == "new"
        assert (old.batches, new.batches) == ([1, 2], [1]), "one canvas, but never one batch of two models"
        assert [each.result().json()["model"]["name"] for each in (waiting, *queued)] == ["old"] * 3
