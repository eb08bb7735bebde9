"""Log lines: one form for machines, one for people, and never in the way."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from queue import SimpleQueue

import pytest

from service.logs import Gathering, Handover, LogFormat, Unhurried, start_logging
from tests.support.serving import wait_until


@pytest.fixture(autouse=True)
def logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    for name in ("_srcfile", "logThreads", "logProcesses", "logMultiprocessing"):
        monkeypatch.setattr(logging, name, getattr(logging, name))
    yield
    root.handlers = handlers
    root.setLevel(level)


def written(monkeypatch: pytest.MonkeyPatch, log_format: LogFormat) -> str:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    listener = start_logging(log_format, "info")
    try:
        raise ValueError("a cause")
    except ValueError:
        logging.getLogger("x").exception("it %s", "failed", extra={"fields": {"request_id": "abc", "status": 500}})
    logging.getLogger("x").debug("not shown")
    listener.stop()
    return stream.getvalue()


@pytest.mark.parametrize("log_format", ["json", "auto"])
def test_where_no_terminal_reads_a_record_is_one_json_line(
    monkeypatch: pytest.MonkeyPatch, log_format: LogFormat
) -> None:
    line = json.loads(written(monkeypatch, log_format))
    assert (line["level"], line["message"], line["request_id"], line["status"]) == ("error", "it failed", "abc", 500)
    assert "ValueError: a cause" in line["exception"]


def test_people_read_the_fields_after_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    first = written(monkeypatch, "text").splitlines()[0]
    assert first.endswith("ERROR it failed request_id=abc status=500")


def test_when_nobody_reads_lines_are_lost_and_memory_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.logs.MAX_WAITING_LINES", 2)
    records: SimpleQueue[logging.LogRecord] = SimpleQueue()
    handler = Handover(records)
    for number in range(5):
        handler.handle(logging.makeLogRecord({"msg": str(number)}))
    assert [records.get().msg, records.get().msg] == ["0", "1"]
    assert records.empty()


class Writes(io.StringIO):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def write(self, text: str) -> int:
        self.count += 1
        return super().write(text)


def test_lines_that_come_together_are_written_together_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("service.logs.time.sleep", pauses.append)
    listener = Unhurried(SimpleQueue(), Gathering(stream := Writes()))
    for number in range(100):
        listener.queue.put(logging.makeLogRecord({"msg": str(number)}))
    listener.start()
    listener.stop()
    assert stream.getvalue().splitlines() == [str(number) for number in range(100)]
    assert len(pauses) <= 1 and stream.count <= 3


def test_lines_that_keep_coming_are_written_meanwhile() -> None:
    handler = Gathering(stream := Writes())
    for number in range(1000):
        handler.handle(logging.makeLogRecord({"msg": str(number)}))
    assert stream.count == 10


def test_lines_that_cannot_be_written_are_lost_and_the_next_are_written() -> None:
    class Full(Writes):
        def write(self, text: str) -> int:
            self.count += 1
            if self.count == 1:
                raise OSError("No space left on device")
            return super().write(text)

    listener = Unhurried(SimpleQueue(), Gathering(stream := Full()))
    listener.start()
    listener.queue.put(logging.makeLogRecord({"msg": "lost"}))
    wait_until(lambda: stream.count == 1)
    listener.queue.put(logging.makeLogRecord({"msg": "written"}))
    listener.stop()
    assert stream.getvalue() == "written\n"


def test_a_line_is_written_soon_and_not_when_the_next_comes() -> None:
    listener = Unhurried(SimpleQueue(), Gathering(stream := Writes()))
    listener.start()
    listener.queue.put(logging.makeLogRecord({"msg": "alone"}))
    wait_until(lambda: stream.getvalue() == "alone\n")
    listener.stop()


def test_a_line_that_cannot_be_made_is_reported_and_the_next_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    handler = Gathering(stream := io.StringIO())
    handler.handle(logging.makeLogRecord({"msg": "%d", "args": ("no number",)}))
    handler.handle(logging.makeLogRecord({"msg": "good"}))
    handler.flush()
    assert stream.getvalue() == "good\n"
    assert "Logging error" in capsys.readouterr().err
