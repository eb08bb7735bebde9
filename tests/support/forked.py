"""`python -m training` in processes that have torch already: a start takes a tenth of a second instead of five.

A server that has imported it, and done nothing else, forks them. For tests that are not about the start itself.
"""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.support.load import free_ports
from training.__main__ import main

SECONDS = 600
forking = multiprocessing.get_context("forkserver")
forking.set_forkserver_preload([__name__, "training.train", "training.exchange.finetune"])


def begun(arguments: Sequence[str], messages: Path, **variables: object) -> BaseProcess:
    """Begin the command with these variables in its environment; what it says goes into a file."""
    texts = {name: str(value) for name, value in variables.items()}
    process = forking.Process(target=run, args=(arguments, Path.cwd(), messages, texts), daemon=True)
    process.start()
    return process


def run(arguments: Sequence[str], folder: Path, messages: Path, variables: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(variables)
    with messages.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.exit(main(arguments))


def run_as_ranks(count: int, arguments: Sequence[str], folder: Path) -> None:
    """Run the command as torchrun would, by so many processes of one machine, which end well."""
    [port] = free_ports(1)
    machine = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    messages = [folder / f"rank-{rank}.txt" for rank in range(count)]
    ranks = [begun(arguments, file, **machine, RANK=rank, LOCAL_RANK=rank) for rank, file in enumerate(messages)]
    end_well(ranks, messages)


def end_well(processes: Sequence[BaseProcess], messages: Sequence[Path]) -> None:
    """Wait for the exit code 0 of all."""
    for process in processes:
        process.join(SECONDS)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * len(processes), [each.read_text() for each in messages]
