"""`python -m service` serves; `python -m service detect` detects in files.

Signals: SIGTERM drains (not ready at once, still serving for the drain delay, then the listener closes and what is in
flight finishes); SIGINT does so without the delay; a second of either ends the process at once; SIGHUP reloads the
model. Exit codes: 0 after draining, 2 for a setting, file, device or port that cannot be used, 128 + signal when cut
short.
"""

import asyncio
import contextlib
import functools
import gc
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import uvicorn

from model.detector import Detector, available_cores
from model.runtime.session import RUNS_AT_ONCE
from service import detect
from service.api.app import create_app
from service.api.connections import BoundedProtocol
from service.api.keys import InvalidKeys
from service.api.service import Service
from service.api.uploads import Uploads
from service.config import PROGRAM, Settings, parse_settings
from service.core.decoders import Decoders
from service.core.engine import Engine
from service.core.memory import Budget, HeldBytes
from service.core.store import ModelStore
from service.gpu import sample_gpus
from service.logs import error_line, start_logging
from service.metrics import Metrics, program_version

logger = logging.getLogger("service")

USAGE_ERROR = 2


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: it would close the listener at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["detect"]:
        return detect.main(arguments[1:])
    settings = parse_settings(arguments)
    listener = start_logging(settings.log_format, settings.log_level)
    try:
        with asyncio.Runner(loop_factory=uvicorn.Config("", log_config=None).get_loop_factory()) as runner:
            code, stuck = runner.run(serve(settings))
    finally:
        listener.stop()
    if stuck:
        os._exit(code)  # Python would wait for the thread, and ONNX Runtime abort the process around it
    return code


async def serve(settings: Settings) -> tuple[int, bool]:
    """Serve until told to stop. Return the exit code, and whether a thread is stuck in a run or in opening a model."""
    try:
        listening = listen(settings.host, settings.port)
    except OSError as error:
        return failed(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}", settings), False
    service = build_service(settings)
    try:
        server = Server(uvicorn_config(service))
        server.config.load()
    except OSError as error:
        return failed(f"cannot use the TLS certificate: {error}", settings), False
    except InvalidKeys as error:
        return failed(str(error), settings), False
    return await Lifecycle(service, server, listening).until_stopped()


class Lifecycle:
    """Start, signals, drain, end."""

    def __init__(self, service: Service, server: Server, listening: socket.socket) -> None:
        self._settings = service.settings
        self._service = service
        self._server = server
        self._listening = listening
        self._loop = asyncio.get_running_loop()
        self._failure: str | None = None

    async def until_stopped(self) -> tuple[int, bool]:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop, number)
        self._loop.add_signal_handler(signal.SIGHUP, self._service.store.ask_reload)
        self._service.engine.decoders.start()
        self._service.engine.start()
        self._service.store.start(self._model_failed, self._model_loaded)
        scheme = "https" if self._settings.ssl_certfile else "http"
        host, port = self._listening.getsockname()[:2]
        logger.info(
            "listening on %s://%s:%d", scheme, f"[{host}]" if ":" in host else host, port,
            extra={"fields": {"version": program_version(), "settings": self._settings.model_dump(mode="json")}},
        )  # fmt: skip
        with sample_gpus(self._service.metrics):
            await self._server.serve([self._listening])
        self._service.store.close()
        stuck = not self._service.engine.close()
        self._service.engine.decoders.close()
        if stuck:
            logger.error("the device is stuck in an inference: leaving it behind")
        stuck = stuck or self._service.store.is_opening
        if self._failure is not None:
            return failed(self._failure, self._settings), stuck
        logger.info("stopped")
        return 0, stuck

    def _stop(self, number: int) -> None:
        """Drain; at the second signal end the process."""
        if self._service.draining:
            os._exit(128 + number)
        self._service.draining = True
        delay_seconds = 0 if number == signal.SIGINT else self._settings.drain_delay_seconds
        logger.info("draining: not ready, still serving for %g s", delay_seconds)
        self._loop.call_later(delay_seconds, self._close_listener)

    def _close_listener(self) -> None:
        self._server.should_exit = True

    def _model_failed(self, reason: str) -> None:
        """End the process with an error. Called on the loader's thread."""
        self._failure = reason
        self._loop.call_soon_threadsafe(self._close_listener)

    def _model_loaded(self) -> None:
        """Freeze the objects that exist now: a garbage collection over them would stop every thread for tens of
        milliseconds. Called on the loader's thread."""
        gc.collect()
        gc.freeze()


def build_service(
    settings: Settings,
    open_detector: Callable[[Path], Detector] | None = None,
    decoders: Decoders | None = None,
) -> Service:
    """Make the parts of the service without starting them. The settings define those that are not given."""
    metrics = Metrics()
    decode_threads = settings.decode_threads or available_cores()
    budget = Budget.of(decode_threads)
    logger.info("memory for requests: %d MiB, %d of it for bodies", budget.total >> 20, budget.bodies >> 20)
    bodies = HeldBytes(min(settings.max_upload_bytes_in_flight, budget.bodies))
    answers = HeldBytes(budget.answers)
    decoders = decoders or Decoders(decode_threads, metrics.decoders)
    default_opener = functools.partial(
        Detector,
        device=settings.device,
        threads=settings.threads,
        gpu_memory_limit_bytes=settings.gpu_memory_limit_bytes,
        runs_at_once=settings.runs_at_once,
        sha256=settings.model_sha256,
    )
    store = ModelStore(
        settings.model_file,
        open_detector or default_opener,
        metrics,
        name=settings.model_name,
        load_timeout_seconds=settings.model_load_timeout_seconds,
        poll_seconds=settings.model_poll_seconds,
        max_batch_size=settings.max_batch_size,
    )
    engine = Engine(
        store,
        decoders,
        metrics,
        budget=budget,
        bodies=bodies,
        answers=answers,
        queue_capacity=settings.queue_capacity,
        max_batch_delay_seconds=settings.max_batch_delay_seconds,
        runs_at_once=settings.runs_at_once or RUNS_AT_ONCE,
        decode_threads=decode_threads,
        max_image_pixels=settings.max_image_pixels,
        max_tiles=settings.max_tiles,
    )
    uploads = Uploads(
        max_image_bytes=settings.max_image_bytes,
        held=bodies,
        timeout_seconds=settings.upload_timeout_seconds,
    )
    service = Service(settings, metrics, store, engine, uploads)
    metrics.upload_bytes_in_flight.set_function(lambda: uploads.bytes_in_flight)
    metrics.ready.set_function(lambda: service.why_not_ready() is None)
    return service


def uvicorn_config(service: Service) -> uvicorn.Config:
    settings = service.settings
    return uvicorn.Config(
        create_app(service),
        http=functools.partial(  # type: ignore[arg-type]  # uvicorn calls it, as it would the class
            BoundedProtocol,
            write_timeout_seconds=settings.write_timeout_seconds,
            keep_alive_seconds=settings.keep_alive_seconds,
            answers=service.engine.answers,
        ),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,  # nothing here looks at the client's address or scheme
        server_header=False,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        # What is in flight ends by itself within these; the rest is for sending the answers.
        timeout_graceful_shutdown=math.ceil(settings.upload_timeout_seconds + settings.request_timeout_seconds + 5),
    )


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; `::` serves IPv4 and IPv6. OSError: the address is not this machine's, or in use."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    return socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=both)


def failed(reason: str, settings: Settings) -> int:
    """Print the reason on one line."""
    sys.stderr.write(error_line(PROGRAM, reason, settings.log_format))
    return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
