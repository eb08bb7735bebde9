"""Logs: JSON lines for machines, plain lines for a terminal, on standard error. No image data, no secrets.

A record's own values travel in `extra={"fields": {...}}`. Writing happens on a thread of its own, so that a slow
reader of standard error cannot stall the event loop.
"""

import contextlib
import json
import logging
import sys
import time
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from queue import SimpleQueue
from typing import Literal, TextIO

MAX_WAITING_LINES = 10_000
MAX_GATHERED_LINES = 100
GATHER_SECONDS = 0.05
LogFormat = Literal["auto", "json", "text"]
ENCODER = json.JSONEncoder(default=str, ensure_ascii=False)


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        } | fields_of(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return ENCODER.encode(line)


class TextLines(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in fields_of(record).items())
        return f"{super().formatMessage(record)} {fields}".rstrip()


class Handover(QueueHandler):
    """Passes records on as they are; while nobody reads what is written, lines are lost rather than memory."""

    queue: "SimpleQueue[logging.LogRecord]"

    def enqueue(self, record: logging.LogRecord) -> None:
        if self.queue.qsize() < MAX_WAITING_LINES:
            self.queue.put(record)

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record


class Gathering(logging.StreamHandler[TextIO]):
    """Writes lines when it is flushed, or has many, all at once. What cannot be written is lost."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.append(self.format(record) + self.terminator)
        except Exception:  # as logging's own handlers: a line that cannot be made must not end what logs
            self.handleError(record)
        if len(self._lines) >= MAX_GATHERED_LINES:
            self.flush()

    def flush(self) -> None:
        lines, self._lines = self._lines, []
        with contextlib.suppress(OSError, ValueError):  # a closed pipe, a full disk, a closed stream
            self.stream.write("".join(lines))
            super().flush()


class Unhurried(QueueListener):
    """Writes what there is, then lets lines gather: to wake a thread for each takes longer than writing it."""

    queue: "SimpleQueue[logging.LogRecord]"

    def handle(self, record: logging.LogRecord) -> None:
        super().handle(record)
        if self.queue.empty():
            self._flush()
            time.sleep(GATHER_SECONDS)

    def stop(self) -> None:
        super().stop()
        self._flush()

    def _flush(self) -> None:
        for handler in self.handlers:
            handler.flush()


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    fields: dict[str, object] = record.__dict__.get("fields", {})
    return fields


def start_logging(log_format: LogFormat, level: str) -> QueueListener:
    """Send every log of this process to standard error in one form; stop the listener to flush."""
    # Who called, and from where, is in no line, and takes a third of the time that a record does.
    logging._srcfile = None
    for what in ("logThreads", "logProcesses", "logMultiprocessing", "logAsyncioTasks"):
        setattr(logging, what, False)
    handler = Gathering(sys.stderr)
    text = log_format == "text" or (log_format == "auto" and sys.stderr.isatty())
    handler.setFormatter(TextLines() if text else JsonLines())
    records: SimpleQueue[logging.LogRecord] = SimpleQueue()
    root = logging.getLogger()
    root.handlers = [Handover(records)]
    root.setLevel(level.upper())
    for library in ("uvicorn", "uvicorn.error", "asyncio"):
        logging.getLogger(library).setLevel(max(logging.WARNING, root.level))
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what is wrong with a picture is its client's to know
    listener = Unhurried(records, handler)
    listener.start()
    return listener
