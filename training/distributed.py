"""Several processes that train as one: `torchrun --nproc-per-node N -m training train ...` starts them.

Every process has a rank and computes its share of each step. Sums over ranks make the losses, and so the gradients,
those of the whole step. Rank 0 alone writes. All ranks call the same collectives in the same order. If a process dies,
the others end instead of hanging: on CPUs with `RankLost`, on GPUs by NCCL's watchdog, which aborts them.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.runtime.cores import available_cores

TIMEOUT = timedelta(minutes=10)
"""Longest wait for another rank. Rank 0 may compute AP meanwhile, which takes a minute for COCO."""
SIGNS_OF_LOSS = ("gloo", "nccl", "connection", "timed out", "timeout", "socket", "broken pipe")
"""Words in the messages of torch's failed collectives, which have no exception class of their own on the CPU."""
MOST_WORKERS = 16
"""Most loading processes by default; each holds two batches in memory."""
Item = TypeVar("Item")


class RankLost(RuntimeError):
    """Another process of the run died or hangs."""


@dataclass(frozen=True)
class Ranks:
    """This process's rank among those of the run; the only one without torchrun."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    """Device of the tensors that collectives take."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Return this rank's items. Every item belongs to one rank; their numbers differ by at most one."""
        return list(items[self.rank :: self.size])

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the smallest (height, width) that covers each rank's."""
        if self.size == 1:
            return size
        sides = torch.tensor(size, device=self.device)
        dist.all_reduce(sides, op=dist.ReduceOp.MAX)
        height, width = sides.tolist()
        return height, width

    def any(self, value: bool) -> bool:
        """Tell whether the value is true on any rank. All ranks wait for each other."""
        return bool(self.sum(torch.tensor(int(value), device=self.device)))

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """Return the items of all ranks, in the order of ranks, on every rank."""
        if self.size == 1:
            return list(items)
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, list(items))
        return [item for part in gathered for item in part]

    def from_first(self, value: Item | None) -> Item:
        """Return rank 0's value on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box)
        assert box[0] is not None
        return box[0]


ALONE = Ranks()


def in_parallel(network: nn.Module, ranks: Ranks) -> nn.Module:
    """Wrap the network so that its gradients are the mean over all ranks; a single rank needs no wrapper."""
    if ranks.size == 1:
        return network
    devices = [torch.device(ranks.device)] if ranks.device.startswith("cuda") else None
    return DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)


@contextmanager
def gradients_kept(network: nn.Module, *, apart: bool) -> Iterator[None]:
    """Let backward add to this rank's gradients; with `apart`, without averaging over the ranks."""
    with network.no_sync() if apart and isinstance(network, DistributedDataParallel) else nullcontext():
        yield


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun started, by gloo on CPUs and NCCL on GPUs; without torchrun there is one rank.

    RankLost: a collective failed, because another process died or did not answer within TIMEOUT.
    """
    if "LOCAL_RANK" not in os.environ:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        on_gpu = device.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT, device_id=device if on_gpu else None)
        yield Ranks(dist.get_rank(), dist.get_world_size(), str(device))
        dist.destroy_process_group()  # not after an error: it may wait for those who are gone
    except RuntimeError as error:
        if not _tells_of_loss(error):
            raise
        raise RankLost(
            f"rank {os.environ['RANK']} stops: another process of the run died or hangs, its own message says why. "
            f"--resume continues from last.pt. ({str(error).strip().splitlines()[0][:160]})"
        ) from error


def loading_processes() -> int:
    """Return the default number of loading processes: this process's share of the cores, at most MOST_WORKERS."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(MOST_WORKERS, available_cores() // processes))


def local_device(device: torch.device) -> torch.device:
    """Return the GPU of this process, by torchrun's local rank."""
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def _tells_of_loss(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(sign in text for sign in SIGNS_OF_LOSS)
