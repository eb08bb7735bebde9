"""Log lines: one form for machines, one for people, and never in the way."""

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import pytest

from service.logs import Handover, LogFormat, start_logging
from tests.support.serving import wait_until


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
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


def test_when_nobody_reads_lines_are_lost_and_memory_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.logs.MAX_WAITING_LINES", 2)
    records: SimpleQueue[logging.LogRecord] = SimpleQueue()
    handler = Handover(records)
    for number in range(5):
        handler.handle(logging.makeLogRecord({"msg": str(number)}))
    assert [records.get().msg, records.get().msg] == ["0", "1"]
    assert records.empty()


@contextmanager
def logging_to(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> Iterator[logging.Logger]:
    """Text lines in the stream; what goes wrong with them on standard error."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        listener = start_logging("text", "info")
    yield logging.getLogger("x")
    listener.stop()


def messages(stream: io.StringIO) -> list[str]:
    return [line.split(" ", 2)[2] for line in stream.getvalue().splitlines()]


class Flushes(io.StringIO):
    """Keeps what had been written at each flush."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed: list[str] = []

    def flush(self) -> None:
        self.flushed.append(self.getvalue())


def test_each_line_is_flushed_as_it_comes_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    with logging_to(monkeypatch, stream := Flushes()) as logger:
        for number in range(100):
            logger.info("%d", number)
    assert messages(stream) == [str(number) for number in range(100)]
    assert [len(text.splitlines()) for text in stream.flushed] == list(range(1, 101))


def test_lines_that_cannot_be_written_are_lost_and_the_next_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        count = 0

        def write(self, text: str) -> int:
            self.count += 1
            if self.count == 1:
                raise OSError("No space left on device")
            return super().write(text)

    with logging_to(monkeypatch, stream := Full()) as logger:
        logger.info("lost")
        wait_until(lambda: stream.count == 1)
        logger.info("written")
    assert messages(stream) == ["written"]


def test_a_line_is_written_soon_and_not_when_the_next_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    with logging_to(monkeypatch, stream := io.StringIO()) as logger:
        logger.info("alone")
        wait_until(lambda: stream.getvalue().endswith("alone\n"))


def test_a_line_that_cannot_be_made_is_reported_and_the_next_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_to(monkeypatch, stream := io.StringIO()) as logger:
        logger.info("%d", "no number")
        logger.info("good")
    assert messages(stream) == ["good"]
    assert "Logging error" in capsys.readouterr().err


def test_standard_error_that_nobody_reads_any_more_ends_nothing() -> None:
    code = (
        "import logging, sys\n"
        "from service.logs import start_logging\n"
        "listener = start_logging('json', 'info')\n"
        "sys.stdin.read()\n"
        "logging.info('nobody reads this')\n"
        "logging.info('nor this')\n"
        "listener.stop()\n"
        "print('waiting:', listener.queue.qsize())"
    )
    read_end, write_end = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=write_end, text=True
    )
    os.close(write_end)
    os.close(read_end)
    out, _ = process.communicate("", timeout=60)
    assert out == "waiting: 0\n"


def test_line_ends_and_escapes_in_what_is_logged_are_shown_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    listener = start_logging("text", "info")
    logging.getLogger("x").info("model %s", "a\nERROR forged", extra={"fields": {"name": "\x1b[2J"}})
    listener.stop()
    [line] = stream.getvalue().splitlines()
    assert line.endswith("INFO model a\\nERROR forged name=\\x1b[2J")
