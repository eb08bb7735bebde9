"""The client against the real service: overload, drain, a rolling restart and a lost replica behind a real haproxy."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from retinaserve_client import Answer, DetectError
from tests.client.driven import CLIENTS, MakeClient
from tests.support.load import blocks, free_ports
from tests.support.replicas import HAPROXY, REPLICAS, proxy
from tests.support.serving import FakeDetector, ServerProcess, picture, server_process, serving, wait_until
from tests.support.tiny_model import write_tiny_model

needs_haproxy = pytest.mark.skipif(HAPROXY is None, reason="needs haproxy, Debian's package of that name")
IMAGE = blocks(90, 80, seed=1)


def test_an_overloaded_service_answers_everyone_in_the_end_and_in_order(make_client: MakeClient) -> None:
    sizes = [(40 + number, 50) for number in range(24)]
    with (
        serving(FakeDetector(seconds=0.02), queue_capacity=2) as server,
        make_client(server.url, attempts=50) as client,
    ):
        answers = list(client.detect_many([picture(*size) for size in sizes], concurrency=8))
        assert server.metric("retinaserve_requests_total", outcome="overloaded") > 0
        assert server.metric("retinaserve_requests_total", outcome="ok") == 24
    assert [(answer.image.width, answer.image.height) for answer in answers] == sizes


def test_as_many_requests_as_told_are_under_way_and_no_more(make_client: MakeClient) -> None:
    """One more would be refused."""
    with serving(detector := FakeDetector(), queue_capacity=3) as server, ThreadPoolExecutor() as pool:
        detector.gate.clear()
        with make_client(server.url, attempts=1) as client:
            answers = pool.submit(lambda: list(client.detect_many([picture()] * 20, concurrency=3)))
            server.wait_until(lambda: server.metric("retinaserve_queue_depth") == 3)
            detector.gate.set()
            assert all(isinstance(answer, Answer) for answer in answers.result())


def test_keys_labels_drawings_and_the_model_are_the_service_s(make_client: MakeClient) -> None:
    with serving(FakeDetector(), api_keys="a-key") as server:
        with make_client(server.url, "a-key") as client:
            assert client.ready()
            assert [label.label for label in client.model().labels] == ["circle", "square"]
            assert [found.label for found in client.detect(picture(), labels=["circle", "square"])] == ["circle"]
            assert len(client.detect(picture(), labels="square")) == 0
            assert client.draw(picture()).startswith(b"\x89PNG")
            with pytest.raises(DetectError, match="hexagon") as wrong:
                client.detect(picture(), labels="hexagon")
        with make_client(server.url) as client, pytest.raises(DetectError) as nobody:
            client.detect(picture())
    assert (wrong.value.code, wrong.value.status) == ("invalid_parameter", 422)
    assert (nobody.value.code, nobody.value.status) == ("unauthorized", 401)


@contextlib.contextmanager
def asking(make_client: MakeClient, url: str, attempts: int) -> Iterator[list[Answer | Exception]]:
    """Meanwhile one picture after the other, four at a time; what became of them."""
    over = threading.Event()
    outcomes: list[Answer | Exception] = []

    def ask() -> None:
        with make_client(url, attempts=attempts, timeout=20, total_timeout=60) as client:
            for outcome in client.detect_many(iter(lambda: None if over.wait(0.01) else IMAGE, None), concurrency=4):
                outcomes.append(outcome)

    with ThreadPoolExecutor() as pool:
        done = pool.submit(ask)
        try:
            yield outcomes
        finally:
            over.set()
            done.result()


def wait_for_more(outcomes: list[Answer | Exception], number: int = 20) -> None:
    wanted = len(outcomes) + number
    wait_until(lambda: len(outcomes) >= wanted)


def codes(outcomes: list[Answer | Exception]) -> set[str]:
    """Collect the codes of the errors."""
    assert all(isinstance(outcome, Answer | DetectError) for outcome in outcomes)
    return {outcome.code for outcome in outcomes if isinstance(outcome, DetectError)}


@pytest.mark.slow
def test_a_service_that_drains_and_comes_back_loses_nothing(tmp_path: Path) -> None:
    [port] = free_ports(1)
    flags = ("--port", str(port), "--drain-delay-seconds", "1")
    with contextlib.ExitStack() as servers, contextlib.ExitStack() as clients:
        old = servers.enter_context(server_process(tmp_path, *flags))
        both = [clients.enter_context(asking(make, old.url, attempts=50)) for make in CLIENTS.values()]
        for outcomes in both:
            wait_for_more(outcomes)
        old.process.send_signal(signal.SIGTERM)
        assert old.process.wait(60) == 0
        new = servers.enter_context(server_process(tmp_path, *flags))
        for outcomes in both:
            wait_for_more(outcomes)
        assert "ok" in {line.get("outcome") for line in new.log() if line.get("route") == "/detect"}
    assert [codes(outcomes) for outcomes in both] == [set(), set()]


@pytest.mark.slow
@needs_haproxy
@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGKILL], ids=["restarted", "lost"])
def test_replicas_restarted_in_haste_or_lost_cost_no_answer(tmp_path: Path, signal_: signal.Signals) -> None:
    """Without a drain delay, and without a second chance in the proxy; a client that does not repeat sees it."""
    ports = dict(zip(REPLICAS, free_ports(2), strict=True))
    with contextlib.ExitStack() as servers, contextlib.ExitStack() as clients:

        def start(replica: str) -> ServerProcess:
            flags = ("--port", str(ports[replica]), "--drain-delay-seconds", "0", "--threads", "1")
            return servers.enter_context(server_process(tmp_path, *flags, model_path=tmp_path / "tiny.onnx"))

        write_tiny_model(tmp_path / "tiny.onnx")
        with ThreadPoolExecutor() as pool:
            started = dict(zip(REPLICAS, pool.map(start, REPLICAS), strict=True))
        through = servers.enter_context(proxy(tmp_path, *ports.values()))
        wait_until(lambda: through.serves_with(*REPLICAS))
        hasty = clients.enter_context(asking(CLIENTS["Client"], through.url, attempts=1))
        patient = [clients.enter_context(asking(make, through.url, attempts=50)) for make in CLIENTS.values()]
        for replica in REPLICAS:
            for outcomes in patient:
                wait_for_more(outcomes)
            started[replica].process.send_signal(signal_)
            started[replica].process.wait(60)
            start(replica)
            wait_until(lambda: through.serves_with(*REPLICAS))
        for outcomes in patient:
            wait_for_more(outcomes)
    assert [codes(outcomes) for outcomes in patient] == [set(), set()]
    assert codes(hasty) != set(), "nothing was lost, so nothing was shown"
