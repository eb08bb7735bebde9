"""uvicorn's HTTP/1.1 protocol with bounds on what a client may send, leave unread or leave undone.

uvicorn lacks these bounds, and settings for them:

- Headers have `HEADER_SECONDS` to arrive. More than `MAX_HEADER_BYTES` or `MAX_HEADER_FIELDS`, trailers and an
  unfinished line included, get 431; a URL of more than `MAX_URL_BYTES` gets 414. All this comes before API keys.
- Pipelined requests are read one at a time: reading pauses while one is being answered and the next has come.
- The connection is reset if the client takes no byte of an answer for `write_timeout_seconds`.
- An offer to upgrade (h2c) is ignored. httptools would stop parsing there, and uvicorn would drop the body behind it.
- Bytes that are not HTTP get a problem, an id, a log line and a count in the metrics; uvicorn answers in plain text.

A refusal goes as `scope["state"]` into the application, where `middleware.Linger` answers it. Bytes that come after it
are discarded.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api.unread_answers import AnswerWatch
from service.api.uploads import MalformedRequest
from service.core.memory import HeldBytes
from service.metrics import OTHER_METHOD

PROTOCOL_ERROR = "protocol_error"
"""Key, in a scope's state, of the exception that says why a request is not read."""
HEADER_SECONDS = 10.0
MAX_HEADER_BYTES = 64 * 1024
MAX_HEADER_FIELDS = 100
MAX_URL_BYTES = 8 * 1024
PIECE_BYTES = 4 * 1024
"""Size of the pieces in which heads and chunked bodies are parsed: only the parser knows where a request ends."""
MAX_BYTES_AFTER_REFUSAL = 1024 * 1024
"""Bytes that are read and discarded, so that no reset destroys the answer; then the connection is closed."""


class HeadersTooLarge(Exception):
    """Send fewer or shorter header fields."""


class UriTooLong(Exception):
    """Send a shorter path and query."""


class Flow(FlowControl):
    """Keeps reading paused while `holds()`, whoever asks to resume it."""

    def __init__(self, transport: asyncio.Transport, holds: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._holds = holds

    def resume_reading(self) -> None:
        if not self._holds():
            super().resume_reading()


class BoundedProtocol(HttpToolsProtocol):
    header_seconds = HEADER_SECONDS
    _header_deadline: asyncio.TimerHandle | None = None
    _unread = b""
    """Bytes that came behind a request that is not answered yet."""
    _in_head = True
    """True: the parser is between two requests, or in the head of one."""
    _has_begun = False
    """True: the parser is in a request."""
    _body_left: int | None = None
    """Bytes of the body still to come; None: the body is chunked."""
    _num_fields = 0
    _field_bytes = 0
    _unended_bytes = 0
    """Bytes parsed since the parser's last event: those of an unfinished header line."""
    _parser_told = False
    _upgrade_offered = False
    _bytes_after_refusal: int | None = None
    """Bytes that came after a refusal; None: nothing was refused."""

    def __init__(
        self, *, write_timeout_seconds: float, keep_alive_seconds: float, answers: HeldBytes, **of_uvicorn: Any
    ) -> None:
        super().__init__(**of_uvicorn)
        self.timeout_keep_alive = keep_alive_seconds  # type: ignore[assignment]  # uvicorn's own setting is whole
        self._write_timeout_seconds, self._answers_held = write_timeout_seconds, answers

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = Flow(transport, lambda: bool(self._unread))
        self._answers = AnswerWatch(transport, self.loop, self._write_timeout_seconds, self._answers_held)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._answers.end()
        self._unread = b""
        super().connection_lost(exc)

    # Reading

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._bytes_after_refusal is None:
            self._unread += data  # nothing is held as a rule, and then this copies nothing
            self._read_on()
        else:
            self._bytes_after_refusal += len(data)
            if self._bytes_after_refusal > MAX_BYTES_AFTER_REFUSAL and self.cycle.response_started:
                self.transport.close()

    def _read_on(self) -> None:
        """Parse the received bytes, up to the end of a request that is not answered yet; the rest waits."""
        data, self._unread = self._unread, b""
        position = 0
        while position < len(data) and self._bytes_after_refusal is None and not self._is_answering():
            if self._in_head:
                self._arm()
            position += self._feed(data[position : self._end_of_piece(data, position)])
        if position < len(data) and self._bytes_after_refusal is None:
            self._unread = data[position:]
            self.flow.pause_reading()

    def _is_answering(self) -> bool:
        """Tell whether the last request has come completely and its answer is not finished."""
        return self._in_head and self.cycle is not None and not self.cycle.response_complete

    def _end_of_piece(self, data: bytes, position: int) -> int:
        """Find where the parser should stop: before the next request, as far as that is known."""
        limit = position + PIECE_BYTES
        if self._in_head:
            end = data.find(b"\r\n\r\n", position, limit)
            return limit if end < 0 else end + 4
        return limit if self._body_left is None else position + self._body_left

    def _feed(self, piece: bytes) -> int:
        """Parse the piece; return how many bytes of it were parsed."""
        self._parser_told = False
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade()
            return int(upgrade.args[0])
        except httptools.HttpParserError as error:
            self._refuse(_reason(error))
        else:
            self._unended_bytes = 0 if self._parser_told else self._unended_bytes + len(piece)
            if self._field_bytes + self._unended_bytes > MAX_HEADER_BYTES:
                self._refuse(_too_many_bytes())
        return len(piece)

    def _ignore_upgrade(self) -> None:
        """Parse the head again, without the offer to upgrade."""
        if not self._upgrade_offered:  # CONNECT, which is answered: what follows is no HTTP
            self._bytes_after_refusal = 0
            self.cycle.keep_alive = False
            return
        head = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        fields = [b"%s: %s\r\n" % field for field in self.headers if field[0] != b"upgrade"]
        self._upgrade_offered = self._has_begun = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._feed(head + b"".join(fields) + b"\r\n")

    # What the parser tells

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._has_begun = True
        self._num_fields = self._field_bytes = 0
        self._arm()

    def on_url(self, url: bytes) -> None:
        self._parser_told = True
        if len(self.url) + len(url) > MAX_URL_BYTES:
            raise UriTooLong(f"the URL has more than the {MAX_URL_BYTES} bytes allowed")
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._parser_told = True
        self._num_fields += 1
        self._field_bytes += len(name) + len(value) + len(b": \r\n")
        if self._num_fields > MAX_HEADER_FIELDS:
            raise HeadersTooLarge(f"the request has more than the {MAX_HEADER_FIELDS} header fields allowed")
        if self._field_bytes > MAX_HEADER_BYTES:
            raise _too_many_bytes()
        if self._in_head:  # nobody asked for trailers
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._disarm()
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._upgrade_offered = True
            return
        super().on_headers_complete()
        self._in_head = False
        self._body_left = next((int(value) for name, value in self.headers if name == b"content-length"), None)

    def on_chunk_header(self) -> None:
        self._parser_told = True

    def on_body(self, body: bytes) -> None:
        self._parser_told = True
        if self._body_left is not None:
            self._body_left -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._upgrade_offered:
            self._in_head, self._has_begun = True, False
            super().on_message_complete()

    # Refusing

    def _refuse(self, error: Exception) -> None:
        """Have the application answer with this error, and close the connection."""
        self._bytes_after_refusal = 0
        self._disarm()
        if not self._in_head:  # the application has its request already, and perhaps waits for more of it
            self.cycle.keep_alive = False
            self.cycle.scope["state"][PROTOCOL_ERROR] = error
            self.cycle.message_event.set()
            if self.cycle.response_complete:
                self.transport.close()
            return
        if not self._has_begun:
            self.on_message_begin()
            self._disarm()
        has_line = bool(self.url)
        try:
            httptools.parse_url(self.url)
        except httptools.HttpParserInvalidURLError:
            self.url = b"*"
        self.scope["state"][PROTOCOL_ERROR] = error
        super().on_headers_complete()
        self.cycle.keep_alive = False
        if not has_line:
            self.scope["method"] = OTHER_METHOD

    # Answering

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._answers.begin()
        if self._unread:  # not here: this answer may be an exception's, which would pass for the parser's cause
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._unread and not self._is_answering() and not self.transport.is_closing():
            self._unset_keepalive_if_required()
            self._read_on()
            self.flow.resume_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._answers.begin()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._answers.count()

    # The headers' deadline

    def _arm(self) -> None:
        if self._header_deadline is None:
            self._header_deadline = self.loop.call_later(self.header_seconds, self._headers_are_late)

    def _disarm(self) -> None:
        if self._header_deadline is not None:
            self._header_deadline.cancel()
            self._header_deadline = None

    def _headers_are_late(self) -> None:
        self._header_deadline = None
        if self._is_answering():  # the rest of them is not even read yet
            self._arm()
        else:
            self.transport.close()


def _reason(error: httptools.HttpParserError) -> Exception:
    """Choose the reason for the client: the error that a callback of ours raised, or that of the parser."""
    cause = error.__context__
    if cause is None or isinstance(cause, httptools.HttpParserError):
        return MalformedRequest(f"this is no HTTP/1.1 request: {cause or error}")
    if isinstance(cause, (HeadersTooLarge, UriTooLong)):
        return cause
    raise error


def _too_many_bytes() -> HeadersTooLarge:
    return HeadersTooLarge(f"the header fields have more than the {MAX_HEADER_BYTES} bytes allowed")
