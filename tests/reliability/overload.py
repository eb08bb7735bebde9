"""Goodput and latency at 1, 2, 5 and 20 times the capacity of a device whose images take a known time.

The device is a clock: what is measured is whether refusals keep it from its work. Where inference and refusals share
cores, they also slow each other down; `tests.benchmarks.service` measures that.
"""

from collections.abc import Sequence
from typing import Any

from tests.benchmarks.service import QUEUE_CAPACITY, overload
from tests.reliability.gate import Figures, Work, summed
from tests.support.serving import build, server_process

LOADS = (20, 5, 2, 1)
SECONDS = 8
GOODPUT, P99 = 0.9, 1.2
"""The least, as a share of capacity; the most, as a multiple of queue × time of one."""


def run(work: Work) -> Figures:
    """Take the loads in turn, a round each."""
    numbers = range(work.first, work.first + work.count)
    return summed([one_round(work, LOADS[number % len(LOADS)]) for number in numbers])


def one_round(work: Work, times: float) -> Figures:
    places = ("--queue-capacity", str(QUEUE_CAPACITY))
    with server_process(work.folder, *places, program=build("timed-device")) as server:
        [taken] = overload(server.url, SECONDS, 1, times)
    goodput = taken.measured.throughput / taken.capacity
    p99 = taken.measured.p99_ms() / taken.bound_ms
    assert set(taken.measured.by_status) <= {200, 429}, taken.measured.by_status.keys()
    assert goodput >= GOODPUT, f"goodput {goodput:.1%} of capacity"
    assert p99 <= P99, f"p99 of the accepted is {p99:.2f} × queue × time of one, goodput {goodput:.1%} of capacity"
    return {f"least_goodput_at_{times}x": goodput, f"most_p99_in_queue_times_at_{times}x": p99, "rounds": 1}


def plot(parts: Sequence[Figures], axes: Any) -> None:
    for times in LOADS:
        name = f"least_goodput_at_{times}x"
        shares = [part[name] for part in parts if name in part]
        axes.plot([times] * len(shares), shares, "o", color="tab:blue")
    axes.axhline(GOODPUT, linestyle="--", color="grey")
    axes.set(xscale="log", xlabel="asked, times capacity", ylabel="answered, of capacity", ylim=(0, 1.1))
    axes.set_xticks(LOADS, [str(times) for times in LOADS])
