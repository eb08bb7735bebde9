"""Work for worker processes that goes well or ill, in a module that is imported within milliseconds."""

import os
import signal
import threading

from training.annotations.fields import InvalidDataSet


def negative_or_worse(order: int) -> int:
    """Answer the negative; 7 kills the process, 8 takes all memory, 9 fails, 10 as users can mend, 11 hangs."""
    if order == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    if order == 8:
        raise MemoryError
    if order == 9:
        raise KeyError("strange")
    if order == 10:
        raise InvalidDataSet("10.png cannot be read")
    if order == 11:
        threading.Event().wait()
    return -order
