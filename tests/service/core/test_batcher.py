"""The queue and the device thread, with jobs that are names."""

import threading
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

import pytest

from service.core.batcher import Batcher, QueueFull
from tests.support.serving import wait_until


@dataclass(eq=False)
class Job:
    name: str
    group: Hashable = "square"
    max_batch_size: int = 8
    gone: bool = False
    admitted: float = field(default_factory=time.monotonic)


@dataclass
class Device:
    """Runs batches when told to, and keeps what it ran."""

    capacity: int = 32
    max_delay_seconds: float = 0
    runs_at_once: int = 1
    shares: Callable[[bool], bool] = lambda crowded: True
    ran: list[list[str]] = field(default_factory=list)
    shared: list[bool] = field(default_factory=list)
    """Of each run, whether it was told to share the device."""
    delivered: list[str] = field(default_factory=list)
    depth_at_delivery: list[int] = field(default_factory=list)
    free: threading.Event = field(default_factory=threading.Event)
    deliver_freely: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.deliver_freely.set()
        self.batcher: Batcher[Job, str] = Batcher(
            self.run,
            self.deliver,
            capacity=self.capacity,
            max_delay_seconds=self.max_delay_seconds,
            runs_at_once=self.runs_at_once,
            shares=self.shares,
        )
        self.batcher.start()

    def run(self, batch: list[Job], shares: bool) -> list[str]:
        self.shared.append(shares)
        self.ran.append([job.name for job in batch])
        self.free.wait()
        return [job.name for job in batch]

    def deliver(self, batch: list[Job], results: list[str]) -> None:
        assert [job.name for job in batch] == results
        self.deliver_freely.wait()
        self.depth_at_delivery.append(self.batcher.depth)
        self.delivered += results

    def put(self, *jobs: Job) -> None:
        for job in jobs:
            self.batcher.take_places(1, 1000)
            self.batcher.put(job)

    def occupy(self) -> None:
        """Put a job and see it run: what comes next waits."""
        self.put(Job("first"))
        wait_until(lambda: self.batcher.running == 1)

    def finish(self) -> None:
        self.free.set()
        wait_until(lambda: self.batcher.depth == 0)
        assert self.batcher.close(10)


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    yield device
    device.free.set()
    assert device.batcher.close(10)


def test_a_lone_job_runs_at_once(device: Device) -> None:
    device.occupy()
    assert device.ran == [["first"]]


def test_what_waited_together_shares_a_batch_of_its_group_oldest_first(device: Device) -> None:
    device.occupy()
    device.put(Job("a"), Job("wide", "wide"), Job("b"), Job("c"))
    device.finish()
    assert device.ran == [["first"], ["a", "b", "c"], ["wide"]]
    assert sorted(device.delivered) == ["a", "b", "c", "first", "wide"]


def test_who_was_admitted_first_is_first_though_its_decoding_took_longer(device: Device) -> None:
    slow, quick = Job("slow", max_batch_size=1), Job("quick", max_batch_size=1)
    device.occupy()
    device.put(quick, slow)
    device.finish()
    assert device.ran == [["first"], ["slow"], ["quick"]]


def test_a_rare_group_is_not_starved_by_a_common_one(device: Device) -> None:
    device.occupy()
    device.put(Job("a", max_batch_size=2), Job("rare", "rare"))
    device.put(*(Job(name, max_batch_size=2) for name in "bcdefg"))
    device.finish()
    assert device.ran == [["first"], ["a", "b"], ["rare"], ["c", "d"], ["e", "f"], ["g"]]


def test_a_batch_is_never_larger_than_allowed(device: Device) -> None:
    device.occupy()
    device.put(*(Job(name, max_batch_size=1) for name in "abc"))
    device.finish()
    assert device.ran == [["first"], ["a"], ["b"], ["c"]]


def test_jobs_that_nobody_waits_for_are_not_run_and_free_their_places(device: Device) -> None:
    device.occupy()
    device.put(Job("a"), gone := Job("gone"), Job("b"))
    gone.gone = True
    device.finish()
    assert device.ran == [["first"], ["a", "b"]]


def test_a_removed_job_frees_its_place_at_once(device: Device) -> None:
    device.occupy()
    device.put(job := Job("a"))
    assert device.batcher.depth == 2
    assert device.batcher.remove(job)
    assert device.batcher.depth == 1
    assert not device.batcher.remove(job)
    assert device.batcher.depth == 1


def test_places_are_all_or_none_and_free_again_before_the_answer_is_out() -> None:
    device = Device(capacity=4)
    device.batcher.take_places(3, 1000)
    with pytest.raises(QueueFull, match="3 of 4 places"):
        device.batcher.take_places(2, 1000)
    assert device.batcher.depth == 3
    for name in "abc":
        device.batcher.put(Job(name))
    device.finish()
    assert 0 in device.depth_at_delivery


def test_retry_after_is_the_time_that_the_queue_takes_to_drain() -> None:
    device = Device(capacity=10)
    device.free.set()
    device.batcher._seconds_per_image = 2.5
    assert device.batcher.retry_after_seconds == 1, "an empty queue"
    device.batcher.take_places(10, 1000)
    with pytest.raises(QueueFull) as refused:
        device.batcher.take_places(1, 1000)
    assert refused.value.retry_after_seconds == 25
    assert device.batcher.close(10)


def test_a_wait_beyond_the_deadline_is_refused_but_never_by_an_empty_queue() -> None:
    device = Device(capacity=10)
    device.batcher._seconds_per_image = 20
    device.batcher.take_places(1, 1), "empty: a wrong estimate must be able to correct itself"
    with pytest.raises(QueueFull, match=r"wait of 20\.0 s exceeds the limit of 1 s"):
        device.batcher.take_places(1, 1)
    device.batcher.take_places(1, 30)
    assert device.batcher.close(10)


def test_the_drain_rate_is_measured(device: Device) -> None:
    device.occupy()
    assert device.batcher.run_seconds > 0
    assert device.batcher.expected_wait_seconds == 0, "nothing is known yet"
    device.free.set()
    wait_until(lambda: device.batcher.depth == 0)
    assert device.batcher.run_seconds == 0
    device.batcher.take_places(1, 1000)
    assert device.batcher.expected_wait_seconds > 0


def test_a_delay_lets_a_batch_fill_and_a_full_one_does_not_wait() -> None:
    device = Device(max_delay_seconds=1000)
    device.free.set()
    device.put(Job("a", max_batch_size=2), Job("b", max_batch_size=2))
    wait_until(lambda: device.ran == [["a", "b"]])
    device.put(Job("c", max_batch_size=2))
    assert device.batcher.close(10), "closing does not wait for the delay"
    assert device.ran == [["a", "b"], ["c"]]


def test_beside_a_batch_that_runs_only_a_full_one_starts() -> None:
    """Who comes later could not join it, so nothing is lost by starting it before the device is free."""
    device = Device(runs_at_once=2)
    device.put(Job("a", max_batch_size=2))
    wait_until(lambda: device.ran == [["a"]])
    device.put(Job("b", max_batch_size=2), Job("wide", "wide", max_batch_size=1))
    device.put(Job("c", max_batch_size=2))
    wait_until(lambda: device.ran == [["a"], ["b", "c"]])
    assert device.batcher.running == 3
    device.put(Job("d", max_batch_size=2), Job("e", max_batch_size=2))
    device.finish()
    assert device.ran[:2] == [["a"], ["b", "c"]]
    assert sorted(device.ran[2:]) == [["d", "e"], ["wide"]], "at once, as the device became free"


def put_together(device: Device, *names: str) -> None:
    """Jobs that fill a batch each, all there before a device thread looks."""
    device.batcher.take_places(len(names), 1000)
    with device.batcher._changed:
        for name in names:
            device.batcher.put(Job(name, max_batch_size=1))


def test_a_lone_job_has_the_device_alone_and_a_crowd_shares_it() -> None:
    device = Device(runs_at_once=2, shares=lambda crowded: crowded)
    device.occupy()
    put_together(device, "a", "b", "c")
    assert device.batcher.running == 1, "the first is alone, though two may run"
    device.free.set()
    wait_until(lambda: device.batcher.depth == 0)
    device.free.clear()
    put_together(device, "d", "e", "f")
    wait_until(lambda: device.batcher.running == 2)
    device.finish()
    told = dict(zip((name for [name] in device.ran), device.shared, strict=True))
    assert told["first"] is False
    assert told["a"] and told["b"] and told["d"] and told["e"]


def test_where_runs_cannot_share_the_device_a_crowd_waits() -> None:
    device = Device(runs_at_once=2, shares=lambda crowded: False)
    put_together(device, "a", "b", "c")
    wait_until(lambda: device.batcher.running == 1)
    device.finish()
    assert device.ran == [["a"], ["b"], ["c"]]
    assert device.shared == [False] * 3


def test_a_batch_that_is_not_full_waits_until_the_device_is_free() -> None:
    device = Device(runs_at_once=2)
    device.occupy()
    device.put(Job("a"))
    device.put(gone := Job("gone"), Job("b"))
    gone.gone = True
    device.finish()
    assert device.ran == [["first"], ["a", "b"]]


def test_the_next_batch_runs_while_the_last_one_is_delivered(device: Device) -> None:
    device.deliver_freely.clear()
    device.free.set()
    device.put(Job("a"))
    wait_until(lambda: device.ran == [["a"]] and device.batcher.depth == 0)
    device.put(Job("b"))
    wait_until(lambda: device.ran == [["a"], ["b"]])
    assert device.delivered == []
    device.deliver_freely.set()


def test_the_drain_rate_counts_time_that_runs_share_once() -> None:
    device = Device(runs_at_once=2)
    started = time.monotonic()
    device.put(Job("a", max_batch_size=1), Job("b", max_batch_size=1))
    wait_until(lambda: device.batcher.running == 2)
    time.sleep(0.2)
    device.finish()
    assert device.batcher._seconds_per_image < time.monotonic() - started - 0.01, (
        "the first took it all, the second none"
    )


def lend_a_thread(device: Device, job: Job) -> threading.Thread:
    """And see it run the job."""
    device.batcher.take_places(1, 1000)
    lent = threading.Thread(target=device.batcher.put_or_run, args=[job])
    lent.start()
    wait_until(lambda: device.ran == [[job.name]])
    return lent


def test_a_thread_that_finds_all_idle_runs_its_job_itself_and_queues_it_otherwise(device: Device) -> None:
    lent = lend_a_thread(device, Job("mine"))
    device.batcher.take_places(1, 1000)
    device.batcher.put_or_run(Job("second"))
    assert device.batcher.depth == 2
    assert device.ran == [["mine"]], "a device thread takes it when the first has ended"
    device.finish()
    lent.join()
    assert device.ran == [["mine"], ["second"]]
    assert sorted(device.delivered) == ["mine", "second"]


def test_closing_waits_for_a_run_on_a_lent_thread(device: Device) -> None:
    lent = lend_a_thread(device, Job("mine"))
    assert not device.batcher.close(0.05)
    device.free.set()
    assert device.batcher.close(10)
    lent.join()


def test_when_a_lent_thread_has_run_another_takes_what_waits_though_a_run_goes_on() -> None:
    """A device thread would take it itself; a lent one does not come back."""
    gates = {name: threading.Event() for name in "abc"}
    ran: list[str] = []

    def run(batch: list[Job], shares: bool) -> list[str]:
        [job] = batch
        ran.append(job.name)
        assert gates[job.name].wait(20)
        return [job.name]

    batcher: Batcher[Job, str] = Batcher(run, lambda batch, results: None, capacity=3, runs_at_once=2)
    batcher.start()
    batcher.take_places(3, 1000)
    lent = threading.Thread(target=batcher.put_or_run, args=[Job("a", max_batch_size=1)])
    lent.start()
    wait_until(lambda: ran == ["a"])
    batcher.put(Job("b", max_batch_size=1))
    wait_until(lambda: ran == ["a", "b"])
    batcher.put(Job("c", max_batch_size=1))
    gates["a"].set()
    wait_until(lambda: ran == ["a", "b", "c"])
    for gate in gates.values():
        gate.set()
    lent.join()
    assert batcher.close(10)


def test_a_job_that_shall_wait_for_others_is_queued_though_all_is_idle() -> None:
    device = Device(max_delay_seconds=1000)
    device.free.set()
    device.batcher.take_places(1, 1000)
    device.batcher.put_or_run(Job("a"))
    assert device.ran == []
    assert device.batcher.close(10)
    assert device.ran == [["a"]]


def test_closing_finishes_what_waits_and_says_when_the_device_is_stuck(device: Device) -> None:
    device.occupy()
    device.put(Job("a"))
    assert not device.batcher.close(0.05)
    device.free.set()
    assert device.batcher.close(10)
    assert device.ran == [["first"], ["a"]]
