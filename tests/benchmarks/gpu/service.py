"""The section `service`: POST /detect with many clients, JPEG in, JSON out."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np

from model.runtime.cores import available_cores
from tests.benchmarks.gpu.plan import Plan
from tests.benchmarks.gpu.report import Report, milliseconds, significant, timed
from tests.benchmarks.measuring import photo
from tests.support.load import Scrape, address
from tests.support.serving import server_process, wait_until

READY_SECONDS = 120
"""A session for each of the common canvases and batch sizes is opened before."""


def service(plan: Plan, report: Report) -> None:
    """Clients are coroutines of this process, the service is a process of its own."""
    jpeg = photo(*plan.picture)
    bare = max((row["images/s"] for table in report.tables("runtime") for row in table
                if isinstance(row.get("images/s"), float)), default=0.0)  # fmt: skip
    flags = ["--device", plan.device, "--queue-capacity", str(4 * max(plan.clients))]
    flags += ["--max-batch-size", str(plan.serving_batch)]
    report.table("clients", "images/s", "p50 ms", "p99 ms", "over the runtime", "mean batch", "GPU used")
    with (
        TemporaryDirectory() as folder,
        server_process(Path(folder), *flags, model_path=plan.model_file(plan.precision), ready=False) as server,
    ):
        _, seconds = timed(lambda: wait_until(lambda: is_ready(server.url), READY_SECONDS))
        report.note(f"ready {seconds:.1f} s after it listened, {_gpu_memory(server.url)}")
        for clients in plan.clients:
            report.attempt([clients], partial(_served, plan, server.url, jpeg, clients, bare))
        report.note(f"after it, {_gpu_memory(server.url)}")
        warnings = [str(line["message"]) for line in server.log() if line.get("level") in ("WARNING", "ERROR")]
        report.note(f"warnings in the log: {warnings[:5] or 'none'}")
    report.note(f"JPEG of {plan.picture}, {len(jpeg) / 1e3:.0f} kB; {available_cores()} cores for service and clients")


def is_ready(url: str) -> bool:
    return httpx.get(url + "/readyz").status_code == 200


def _gpu_memory(url: str) -> str:
    used = [value for (name, _), value in Scrape(url).samples.items() if name.endswith("gpu_memory_used_bytes")]
    return f"{used[0] / 1e9:.1f} GB of the card in use" if used else "no GPU metrics"


def _served(plan: Plan, url: str, jpeg: bytes, clients: int, bare: float) -> Sequence[Any]:
    before = Scrape(url)
    latencies, seconds = asyncio.run(ask_constantly(url, jpeg, clients, 8 * plan.seconds))
    after = Scrape(url)
    images, batches = (
        after(f"retinaserve_batch_size_{what}") - before(f"retinaserve_batch_size_{what}") for what in ("sum", "count")
    )
    used = [value for (name, _), value in after.samples.items() if name.endswith("gpu_utilization_ratio")]
    p50, p99 = np.percentile(latencies, [50, 99])
    rate = len(latencies) / seconds
    return [significant(rate), milliseconds(float(p50)), milliseconds(float(p99)), f"{rate / bare:.3f}" if bare else "",
            round(images / max(batches, 1), 2), used[0] if used else ""]  # fmt: skip


async def ask_constantly(url: str, jpeg: bytes, clients: int, seconds: float) -> tuple[list[float], float]:
    """Seconds of each answer that came after the first fifth of the time, and how long the rest of it was.

    RuntimeError: an answer is not 200.
    """
    head = f"POST /detect HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
    request = head.encode() + jpeg
    begin = time.perf_counter() + seconds / 5
    end = begin + seconds
    latencies: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection(*address(url))
        with contextlib.closing(writer):
            while (started := time.perf_counter()) < end:
                writer.write(request)
                answer = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = next(line for line in answer.split(b"\r\n") if line.startswith(b"content-length:"))
                body = await reader.readexactly(int(length[15:]))
                if not answer.startswith(b"http/1.1 200"):
                    raise RuntimeError(f"the service answers {body[:200]!r}")
                answered = time.perf_counter()
                if answered >= begin:
                    latencies.append(answered - started)

    await asyncio.gather(*(client() for _ in range(clients)))
    return latencies, time.perf_counter() - begin
