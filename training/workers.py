"""Worker processes that make objects in turns, which this process takes in order: a training's batches.

Objects come back through their worker's own pipe, by value. torch's DataLoader uses shared memory, of which a container
has 64 MB (/dev/shm), and waits for ever when that is full. Here waiting ends: a worker that dies or cannot allocate
memory is an error at once, and a signal handler that raises interrupts the wait.
"""

import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

AHEAD = 2
"""Orders that each worker has at once."""
READY = 2
"""Finished objects that wait in this process."""
LONGEST_WAIT = 600.0
"""Longest wait for one object, seconds; after it something hangs, such as a file system."""
NEED_LESS = "fewer --workers or a smaller --batch-size need less memory"
Order = TypeVar("Order")
Made = TypeVar("Made")


class WorkerLost(RuntimeError):
    """A worker process died, cannot allocate memory, or hangs."""


@dataclass(frozen=True)
class _Failed:
    error: Exception


@dataclass(frozen=True)
class _Worker(Generic[Order, Made]):
    process: BaseProcess
    connection: Connection

    def receive(self) -> Made:
        """Take the worker's next object. WorkerLost: it is dead. The worker's own errors are raised."""
        try:
            made = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(5)
            raise WorkerLost(_cause_of_death(self.process)) from error
        if isinstance(made, _Failed):
            raise made.error
        return made  # type: ignore[no-any-return]


def made_in_order(
    make: Callable[[Order], Made],
    orders: Iterable[Order],
    workers: int,
    finish: Callable[[Made], Made] = lambda made: made,
) -> Generator[Made, None, None]:
    """Yield what `make` makes of each order, by so many processes; 0: in this one. Close it if it is not exhausted.

    make    picklable, like its results
    finish  a last change of each result, on a thread of this process
    WorkerLost: a worker died, cannot allocate memory, or hangs. Errors of `make` are raised in their turn.
    """
    if not workers:
        yield from (finish(make(order)) for order in orders)
        return
    pool: list[_Worker[Order, Made]] = []
    ready: queue.Queue[Any] = queue.Queue(READY)
    closed = threading.Event()
    receiver = threading.Thread(target=_receive, args=(pool, iter(orders), finish, ready, closed), daemon=True)
    try:
        for _ in range(workers):
            pool.append(_start(make))
        receiver.start()
        while (made := _next(ready)) is not ready:
            yield made
    finally:
        closed.set()
        for worker in pool:
            worker.process.kill()
        if receiver.ident is not None:
            receiver.join()
        for worker in pool:
            worker.process.join()
            worker.connection.close()


def _next(ready: "queue.Queue[Any]") -> Any:
    try:
        made = ready.get(timeout=LONGEST_WAIT)
    except queue.Empty as error:
        raise WorkerLost(f"no batch came within {LONGEST_WAIT:g} s: reading the pictures hangs") from error
    if isinstance(made, _Failed):
        raise made.error
    return made


def _start(make: Callable[[Order], Made]) -> _Worker[Order, Made]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(make, theirs), daemon=True)
    process.start()
    theirs.close()  # so that its death ends the connection
    return _Worker(process, ours)


def _receive(
    pool: list[_Worker[Order, Made]],
    orders: Iterator[Order],
    finish: Callable[[Made], Made],
    ready: "queue.Queue[Any]",
    closed: threading.Event,
) -> None:
    """Give orders, and put the results, in order, into `ready`; at the end the queue itself, or the error."""
    turns, making = cycle(pool), deque[_Worker[Order, Made]]()

    def give(count: int) -> None:
        for order in islice(orders, count):
            worker = next(turns)
            making.append(worker)
            worker.connection.send(order)

    def put(made: Any) -> None:
        while not closed.is_set():
            with suppress(queue.Full):
                ready.put(made, timeout=0.1)
                return

    try:
        give(AHEAD * len(pool))
        while making:
            made = making.popleft().receive()
            give(1)
            put(finish(made))
        put(ready)
    except BrokenPipeError:  # a dead worker was given an order
        put(_Failed(WorkerLost(_cause_of_death(making[-1].process))))
    except Exception as error:
        put(_Failed(error))


def _work(make: Callable[[Any], Any], connection: Connection) -> None:
    """Make the ordered objects, until the other process has ended."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to the whole process group, the main process decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while True:
            connection.send(_made(make, connection.recv()))
    except MemoryError:
        connection.send(_Failed(WorkerLost(f"a process that loads samples cannot allocate memory; {NEED_LESS}")))
    except (EOFError, OSError):
        pass


def _made(make: Callable[[Any], Any], order: Any) -> Any:
    try:
        return make(order)
    except MemoryError:
        return _Failed(WorkerLost(f"a process that loads samples cannot allocate memory; {NEED_LESS}"))
    except ValueError as error:  # what users can mend
        return _Failed(error)
    except Exception as error:
        traceback.print_exc()
        return _Failed(RuntimeError(f"a process that loads samples failed: {type(error).__name__}: {error}"))


def _cause_of_death(process: BaseProcess) -> str:
    code = process.exitcode
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
    hint = f", as the kernel does where memory is short; {NEED_LESS}" if code == -signal.SIGKILL else ""
    return f"a process that loads samples (pid {process.pid}) {how}{hint}"
