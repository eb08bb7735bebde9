"""Logs: JSON lines for machines, plain lines for a terminal, on standard error. No image data, no secrets.

A record's own values are in `extra={"fields": {...}}`. A thread of its own writes, so that a slow reader of standard
error cannot stall the event loop. Each line is written at once.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from queue import SimpleQueue
from typing import Literal

MAX_WAITING_LINES = 10_000
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
        return printable(f"{super().formatMessage(record)} {fields}".rstrip())


class Handover(QueueHandler):
    """Passes records on unchanged; if the writer cannot keep up, it drops lines instead of holding memory."""

    queue: "SimpleQueue[logging.LogRecord]"

    def enqueue(self, record: logging.LogRecord) -> None:
        if self.queue.qsize() < MAX_WAITING_LINES:
            self.queue.put(record)

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record


def printable(text: str) -> str:
    """Spell out control characters, line ends too, so that no file name can control a terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    fields: dict[str, object] = record.__dict__.get("fields", {})
    return fields


def error_line(program: str, reason: str, log_format: str) -> str:
    """Make the last line before exit code 2: JSON if that is the log format, so that log collectors see the error."""
    text = printable(f"{program}: error: {reason}")
    if log_format == "json":
        text = JsonLines().format(logging.makeLogRecord({"levelname": "ERROR", "msg": text}))
    return text + "\n"


def start_logging(log_format: LogFormat, level: str) -> QueueListener:
    """Send all logs of this process to standard error in one format; stop the listener to write waiting lines."""
    handler = logging.StreamHandler(sys.stderr)
    text = log_format == "text" or (log_format == "auto" and sys.stderr.isatty())
    handler.setFormatter(TextLines() if text else JsonLines())
    records: SimpleQueue[logging.LogRecord] = SimpleQueue()
    root = logging.getLogger()
    root.handlers = [Handover(records)]
    root.setLevel(level.upper())
    for library in ("uvicorn", "uvicorn.error", "asyncio"):
        logging.getLogger(library).setLevel(max(logging.WARNING, root.level))
    listener = QueueListener(records, handler)
    listener.start()
    return listener
