"""Log lines: one form for machines, one for people, and never in the way."""

import io
import json
import logging
import queue
import sys
from collections.abc import Iterator

import pytest

from service.logs import Handover, LogFormat, Unhurried, start_logging


@pytest.fixture(autouse=True)
def root_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
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


def test_when_nobody_reads_lines_are_lost_and_memory_is_not() -> None:
    records: queue.Queue[logging.LogRecord] = queue.Queue(2)
    handler = Handover(records)
    for number in range(5):
        handler.handle(logging.makeLogRecord({"msg": str(number)}))
    assert [records.get().msg, records.get().msg] == ["0", "1"]


def test_lines_that_come_together_are_written_together_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("service.logs.time.sleep", pauses.append)
    stream = io.StringIO()
    listener = Unhurried(queue.Queue(), logging.StreamHandler(stream))
    for number in range(100):
        listener.queue.put_nowait(logging.makeLogRecord({"msg": str(number)}))
    listener.start()
    listener.stop()
    assert stream.getvalue().splitlines() == [str(number) for number in range(100)]
    assert len(pauses) <= 1
