"""Hill climbing over genes: numbers with ranges, each a count or a size in a file's structure, or a choice."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from types import MappingProxyType

from tests.search.cost import Cost, Meter

Genes = dict[str, int]
PATIENCE = 30
"""So many tries without a gain end a climb; the next one starts elsewhere."""


@dataclass(frozen=True)
class Species:
    """A format: the ranges of its genes, both ends included, and how a file is made of genes."""

    ranges: Mapping[str, tuple[int, int]]
    build: Callable[[Genes], bytes]
    starts: Sequence[Genes] = ()
    """Known attacks: the first climbs begin there, the others anywhere. What they leave out is drawn."""


@dataclass(frozen=True)
class Found:
    genes: Genes
    size: int
    cost: Cost


def search(species: Species, meter: Meter, max_bytes: int, seconds: float, seed: int) -> list[Found]:
    """Return the costliest file for each of claim, time and memory. Each climb is for one of them, in turn."""
    rng, end = random.Random(seed), time.monotonic() + seconds
    kinds: tuple[Callable[[Cost], float], ...] = (lambda c: c.time, lambda c: c.memory, lambda c: c.claim)
    best: list[Found | None] = [None] * len(kinds)
    turn = 0
    while time.monotonic() < end or turn <= len(species.starts) or None in best:
        start = species.starts[turn] if turn < len(species.starts) else {}
        for found in climb(species, meter, max_bytes, end, rng, kinds[turn % len(kinds)], start):
            for number, kind in enumerate(kinds):
                known = best[number]
                if known is None or kind(found.cost) > kind(known.cost):
                    best[number] = found
        turn += 1
    return [found for found in best if found is not None]


def climb(
    species: Species,
    meter: Meter,
    max_bytes: int,
    end: float,
    rng: random.Random,
    kind: Callable[[Cost], float],
    start: Mapping[str, int] = MappingProxyType({}),
) -> list[Found]:
    """Return all that was tried, until PATIENCE ends or the time, time.monotonic(), has come."""
    here, tried, since = None, list[Found](), 0
    while since < PATIENCE and (time.monotonic() < end or here is None):
        genes = _random(species, rng) | dict(start) if here is None else _mutated(here.genes, species, rng)
        data = species.build(genes)
        since += 1
        if len(data) > max_bytes:
            continue
        found = Found(genes, len(data), meter.cost(data))
        tried.append(found)
        if here is None or kind(found.cost) > kind(here.cost):
            here, since = found, 0
    return tried


def _random(species: Species, rng: random.Random) -> Genes:
    return {name: _draw(low, high, rng) for name, (low, high) in species.ranges.items()}


def _draw(low: int, high: int, rng: random.Random) -> int:
    """Draw evenly over orders of magnitude."""
    return min(high, int(exp(rng.uniform(log(low + 1), log(high + 2)))) - 1)


def _mutated(genes: Genes, species: Species, rng: random.Random) -> Genes:
    """Change one gene or two: to anything, by a factor, or to an end of its range."""
    changed = dict(genes)
    for name in rng.sample(sorted(genes), k=min(len(genes), rng.randint(1, 2))):
        low, high = species.ranges[name]
        by_factor = int(changed[name] * rng.choice((0.5, 0.9, 1.1, 2, 8)) + rng.randint(-1, 1))
        changed[name] = min(high, max(low, rng.choice((_draw(low, high, rng), by_factor, low, high))))
    return changed
