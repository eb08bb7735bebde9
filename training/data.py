"""The samples of each step, and their loading by worker processes.

The order of pictures and the randomness of a sample depend only on (seed, epoch, index). So a resumed run sees the same
samples as an uninterrupted one, with any number of workers, and the ranks of a run divide the samples of one process.
"""

import logging
import multiprocessing
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice

import cv2
import numpy as np
import torch

from model.metadata import ResizePolicy
from training.coco import CocoDataSet, InvalidDataSet
from training.config import AugmentConfig, TrainConfig
from training.distributed import ALONE, Ranks
from training.transforms import Batch, Sample, augment, collate
from training.workers import made_in_order

log = logging.getLogger(__name__)
# First words of the seeds, so that no two streams of random numbers are the same.
ORDER, SAMPLE, CROP, ANCHORS = 1, 2, 3, 4


@dataclass(frozen=True)
class SampleKey:
    epoch: int
    index: int
    crop_size: int | None


class TrainingSamples:
    def __init__(self, data_set: CocoDataSet, config: AugmentConfig, resize: ResizePolicy, seed: int) -> None:
        self.data_set, self.config, self.resize, self.seed = data_set, config, resize, seed

    def batch(self, keys: Sequence[SampleKey]) -> Batch:
        """Make a batch of the samples of a step, or of this rank's share. For worker processes."""
        if multiprocessing.parent_process():  # the workers share the cores among them
            cv2.setNumThreads(1)
        return collate([self[key] for key in keys], self.resize.divisor)

    def __getitem__(self, key: SampleKey) -> Sample:
        """Return the picture of this index, or the next readable one with the faults of those before it."""
        rng = np.random.default_rng([SAMPLE, self.seed, key.epoch, key.index])
        return augment(self._read(key.index), self.config, self.resize, rng, key.crop_size)

    def _read(self, first: int) -> Sample:
        unreadable: list[str] = []
        for offset in range(len(self.data_set)):
            index = (first + offset) % len(self.data_set)
            try:
                pixels = self.data_set.read(index)
            except InvalidDataSet as error:
                unreadable.append(str(error))
            else:
                return Sample(pixels, self.data_set.pictures[index].target, tuple(unreadable))
        raise InvalidDataSet(f"none of the {len(self.data_set)} pictures can be read: {unreadable[0]}")


def schedule(
    sizes: Sequence[tuple[int, int]], config: AugmentConfig, num_images: int, seed: int, *, group_by_aspect: bool
) -> Iterator[list[SampleKey]]:
    """Yield the keys of each step's samples, endlessly: shuffled epochs cut into steps, across epoch borders.

    sizes       (height, width) of every picture, by which `group_by_aspect` forms the steps
    num_images  images of a step, if crops have no batch sizes of their own
    """
    rng = np.random.default_rng([CROP, seed])
    groups = [int(group_by_aspect and height > width) for height, width in sizes]
    waiting: tuple[list[tuple[int, int]], ...] = ([], [])
    order = _endless_order(len(sizes), seed)
    while True:
        crop_size, batch_size = None, num_images
        if config.crop_sizes:
            drawn = int(rng.choice(len(config.crop_sizes), p=config.crop_probabilities))
            crop_size, batch_size = config.crop_sizes[drawn], config.crop_batch_sizes[drawn]
        full = next((group for group in waiting if len(group) >= batch_size), None)
        while full is None:
            epoch, index = next(order)
            group = waiting[groups[index]]
            group.append((epoch, index))
            full = group if len(group) == batch_size else None
        yield [SampleKey(epoch, index, crop_size) for epoch, index in full[:batch_size]]
        del full[:batch_size]


def sampling_seed(seed: int, step: int) -> int:
    """Derive the seed of a step's sampled anchors."""
    return int(np.random.default_rng([ANCHORS, seed, step]).integers(2**63))


def load_batches(
    data_set: CocoDataSet,
    config: TrainConfig,
    *,
    first_step: int,
    workers: int,
    ranks: Ranks = ALONE,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """Yield this rank's share of the batches of steps first_step … config.steps - 1. Skipped pictures are logged.

    InvalidDataSet, at the batch of the picture: it cannot be read, and `unreadable` is not skip.
    WorkerLost: a worker process died, cannot allocate memory, or hangs.
    ValueError: a step has too few images for the ranks and the parts.
    """
    smallest = min(config.augment.crop_batch_sizes or (config.batch_size,))
    if smallest < ranks.size * config.accumulate_steps:
        raise ValueError(
            f"a step of {smallest} images cannot be shared by {ranks.size} processes in {config.accumulate_steps} "
            f"parts each; a larger --batch-size (or --crop-batch-sizes) can"
        )
    sizes = [picture.size for picture in data_set.pictures]
    steps = schedule(sizes, config.augment, config.batch_size, config.seed, group_by_aspect=config.group_by_aspect)
    keys = (ranks.share(step) for step in islice(steps, first_step, config.steps))
    samples = TrainingSamples(data_set, config.augment, config.resize, config.seed)
    finish = partial(_pinned, torch.cuda.current_device()) if pin_memory else _as_it_is
    skipped: set[str] = set()
    with closing(made_in_order(samples.batch, keys, workers, finish)) as batches:
        for batch in batches:
            for problem in batch.unreadable:
                if config.unreadable == "stop":
                    raise InvalidDataSet(f"{problem}; --unreadable skip continues without it")
                if problem not in skipped:
                    skipped.add(problem)
                    log.warning("skipped and replaced by another picture (%d so far): %s", len(skipped), problem)
            yield batch


def _pinned(device: int, batch: Batch) -> Batch:
    """Move a batch to pinned memory, for asynchronous copies to `device`. Runs on a thread of its own."""
    torch.cuda.set_device(device)
    return batch.pin_memory()


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _endless_order(num_pictures: int, seed: int) -> Iterator[tuple[int, int]]:
    epoch = 0
    while True:
        for index in np.random.default_rng([ORDER, seed, epoch]).permutation(num_pictures):
            yield epoch, int(index)
        epoch += 1
