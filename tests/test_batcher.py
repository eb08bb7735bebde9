"""The queue and the device thread, with jobs that are names."""

import threading
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import pytest

from service.batcher import Batcher, QueueFull
from tests.serving import wait_until


@dataclass(eq=False)
class Job:
    name: str
    group: Hashable = "square"
    max_batch_size: int = 8
    gone: bool = False


@dataclass
class Device:
    """Runs batches when told to, and keeps what it ran."""

    capacity: int = 32
    max_delay_seconds: float = 0
    ran: list[list[str]] = field(default_factory=list)
    delivered: list[str] = field(default_factory=list)
    depth_at_delivery: list[int] = field(default_factory=list)
    free: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.batcher: Batcher[Job, str] = Batcher(
            self.run, self.deliver, capacity=self.capacity, max_delay_seconds=self.max_delay_seconds
        )
        self.batcher.start()

    def run(self, batch: list[Job]) -> list[str]:
        self.ran.append([job.name for job in batch])
        self.free.wait()
        return [job.name for job in batch]

    def deliver(self, batch: list[Job], results: list[str]) -> None:
        assert [job.name for job in batch] == results
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
    assert device.delivered == ["first", "a", "b", "c", "wide"]


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
    assert device.depth_at_delivery[-1] == 0


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


def test_closing_finishes_what_waits_and_says_when_the_device_is_stuck(device: Device) -> None:
    device.occupy()
    device.put(Job("a"))
    assert not device.batcher.close(0.05)
    device.free.set()
    assert device.batcher.close(10)
    assert device.ran == [["first"], ["a"]]
