"""Which samples make which step, and their loading by worker processes.

The order of pictures and the randomness of a sample depend only on (seed, epoch, index): a run that was stopped and
resumed sees the same samples as one that was not, with any number of workers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from torch.utils.data import DataLoader, Dataset

from training.coco import CocoDataSet
from training.config import TrainConfig
from training.transforms import Batch, Sample, augment, collate

# First words of the seeds, so that no two streams of random numbers are the same.
ORDER, SAMPLE, CROP = 1, 2, 3


@dataclass(frozen=True)
class SampleKey:
    epoch: int
    index: int
    crop_size: int | None


class TrainingSamples(Dataset[Sample]):
    def __init__(self, data_set: CocoDataSet, config: TrainConfig) -> None:
        self.data_set = data_set
        self.config = config

    def __getitem__(self, key: SampleKey) -> Sample:
        rng = np.random.default_rng([SAMPLE, self.config.seed, key.epoch, key.index])
        sample = Sample(self.data_set.read(key.index), self.data_set.pictures[key.index].target)
        return augment(sample, self.config.augment, self.config.resize, rng, key.crop_size)


def schedule(num_pictures: int, config: TrainConfig) -> Iterator[list[SampleKey]]:
    """The keys of each step's samples, without end: shuffled epochs cut into steps, across epoch borders."""
    order = _endless_order(num_pictures, config.seed)
    rng = np.random.default_rng([CROP, config.seed])
    crops = config.augment
    while True:
        crop_size, batch_size = None, config.batch_size
        if crops.crop_sizes:
            drawn = int(rng.choice(len(crops.crop_sizes), p=crops.crop_probabilities))
            crop_size, batch_size = crops.crop_sizes[drawn], crops.crop_batch_sizes[drawn]
        pairs = [next(order) for _ in range(batch_size)]
        yield [SampleKey(epoch, index, crop_size) for epoch, index in pairs]


def load_batches(data_set: CocoDataSet, config: TrainConfig, *, first_step: int, workers: int) -> Iterator[Batch]:
    """The batches of steps first_step … config.steps - 1."""
    steps = schedule(len(data_set), config)
    keys = [next(steps) for _ in range(config.steps)][first_step:]
    loader = DataLoader(
        TrainingSamples(data_set, config),
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=_Collate(config.resize.divisor),
        worker_init_fn=_one_thread,
        multiprocessing_context="spawn" if workers else None,
    )
    return iter(loader)


@dataclass(frozen=True)
class _Collate:
    divisor: int

    def __call__(self, samples: list[Sample]) -> Batch:
        return collate(samples, self.divisor)


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(1)


def _endless_order(num_pictures: int, seed: int) -> Iterator[tuple[int, int]]:
    epoch = 0
    while True:
        for index in np.random.default_rng([ORDER, seed, epoch]).permutation(num_pictures):
            yield epoch, int(index)
        epoch += 1
