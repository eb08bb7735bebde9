"""Detection over any number of pictures by Ray Data: paths in, rows of `cluster.results` out.

paths --blocks--> Worker, one actor for each core or GPU: read, decode, detect --rows--> this process --Parquet--> DEST

This process alone writes, so the rows in DEST are the checkpoint. Ray's own checkpoint (`CheckpointConfig`, beta) is a
second record, which a kill can separate from the rows. Workers, not Ray's readers, read the files, within bounds. So an
unreadable file costs its own row and not the job, no picture crosses the object store, and only the workers need CPUs,
so that the job runs on one. A worker that dies is replaced, and its block is done again.
"""

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

import onnxruntime
import pyarrow as pa
import ray
import ray.data
from pyarrow import compute
from ray.data import ActorPoolStrategy, DataContext
from tqdm import tqdm

from cluster.pictures import Pictures, shown
from cluster.results import SCHEMA, Results
from model.detector import Detector, InferenceFailed, available_cores
from model.image import decode_image
from model.tiles import Tiling
from model.types import Pixels
from service.config import Settings
from service.detect import FORESEEN
from service.logs import printable

READ_AHEAD = {"cpu": 2, "cuda": 8}
"""Pictures that are read and decoded while one is on the device."""
MIN_BLOCK, MAX_BLOCKS, BLOCKS_PER_WORKER = 16, 10_000, 8
"""Paths that a worker takes at once: few, so that all workers end together and a kill loses little, but enough that the
number of blocks of a large job does not burden Ray."""
MAX_ROWS_PER_FILE = 20_000
LOG_SECONDS = 60
"""Seconds between two lines of progress in a log."""
BLOCK_SCHEMA = SCHEMA.append(pa.field("unread", pa.string()))
"""Schema of a block. `unread` says why a picture has no row; the next start of the job tries it again."""


@dataclass(frozen=True)
class Pool:
    """The workers of a job, and the resources that each requests of Ray."""

    device: str
    workers: int
    needs: Mapping[str, float]

    @property
    def logical(self) -> dict[str, float]:
        """Arguments of `map_batches`."""
        return {f"num_{name.lower()}s": count for name, count in self.needs.items()}


class Worker:
    """An actor: a detector, and threads that read and decode ahead of it."""

    def __init__(self, pictures: Pictures, settings: Settings, tiling: Tiling | None, sha256: str) -> None:
        """Open the model. `settings.device` is cpu or cuda. InvalidModel: this machine has another file.
        DeviceUnavailable."""
        self._pictures, self._settings, self._tiling = pictures, settings, tiling
        self._detector = Detector(
            settings.model_file,
            device=settings.device,
            threads=settings.threads,
            gpu_memory_limit_bytes=settings.gpu_memory_limit_bytes,
            sha256=sha256,
        )
        self._names = {label.class_id: label.label for label in self._detector.metadata.labels}
        self._ahead = READ_AHEAD[settings.device]
        self._readers = ThreadPoolExecutor(self._ahead)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Turn paths into rows of BLOCK_SCHEMA. InferenceFailed: the device is lost; every other picture would fail
        too."""
        paths = [from_ascii(path) for path in block["path"].to_pylist()]
        return pa.Table.from_pylist([self._row(*loading) for loading in self._loading(paths)], BLOCK_SCHEMA)

    def _loading(self, paths: Sequence[str]) -> Iterator[tuple[str, Future[Pixels]]]:
        waiting: deque[tuple[str, Future[Pixels]]] = deque()
        for path in paths:
            waiting.append((path, self._readers.submit(self._load, path)))
            if len(waiting) > self._ahead:
                yield waiting.popleft()
        yield from waiting

    def _load(self, path: str) -> Pixels:
        data = self._pictures.read(path, self._settings)
        return decode_image(data, max_pixels=self._settings.max_image_pixels)

    def _row(self, path: str, loading: Future[Pixels]) -> dict[str, Any]:
        row: dict[str, Any] = {"path": shown(path), "model_sha256": self._detector.sha256, "detections": []}
        try:
            pixels = loading.result()
            row["height"], row["width"], _ = pixels.shape
            row["detections"] = self._detections(pixels)
        except Exception as error:  # the boundary of one picture, as in `service detect`
            if isinstance(error, InferenceFailed) and error.kind == "cuda":
                raise
            row["unread" if passes(error) else "error"] = str(error) if isinstance(error, FORESEEN) else repr(error)
        return row

    def _detections(self, pixels: Pixels) -> list[dict[str, Any]]:
        found = self._detector.detect(
            pixels,
            score_threshold=self._settings.score_threshold,
            nms_threshold=self._settings.nms_threshold,
            max_detections=self._settings.max_detections,
            tiling=self._tiling,
        )
        sides = ("xmin", "ymin", "xmax", "ymax")
        return [
            {"label": self._names[label], "class_id": label, "score": score, **dict(zip(sides, box, strict=True))}
            for label, score, box in zip(found.labels.tolist(), found.scores, found.boxes, strict=True)
        ]


def passes(error: Exception) -> bool:
    """Tell whether the picture may succeed another time: the network, a permission or memory failed, not the
    picture."""
    return isinstance(error, OSError | MemoryError) or (isinstance(error, InferenceFailed) and error.kind == "oom")


def recipe(settings: Settings, tiling: Tiling | None) -> dict[str, Any]:
    """Return all values on which rows depend, with the model file's thresholds for those not set. InvalidModel."""
    detector = Detector(settings.model_file, device="cpu", threads=1)
    options = ("score_threshold", "nms_threshold", "max_detections")
    given = {name: getattr(settings, name) for name in options}
    return {
        "model_sha256": detector.sha256,
        **{name: getattr(detector.metadata, name) if value is None else value for name, value in given.items()},
        "max_image_pixels": settings.max_image_pixels,
        "tile": None if tiling is None else tiling.size,
        "overlap": None if tiling is None else tiling.overlap,
    }


def connect(address: str | None, workers: int | None, threads: int) -> None:
    """Join the cluster at this address; None: start one on this machine, with as many logical CPUs as the workers need.

    ConnectionError: there is no cluster, or none could be started.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # or it tells of plans, and of progress bars
    if address is not None:
        ray.init(address=address, logging_level="WARNING")
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or it reports to its makers
    cpus = max(available_cores(), (workers or 1) * threads)
    try:
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level="WARNING")
    except Exception as error:  # Ray's have no class of their own: on a busy machine it gives up after 30 s
        raise ConnectionError(f"Ray could not be started: {error}") from error


def pool_for(device: str, workers: int | None, threads: int, resources: Mapping[str, float]) -> Pool:
    """Choose the workers for a cluster. ValueError: it has too few CPUs or GPUs for them."""
    with_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if device == "auto":
        device = "cuda" if with_cuda and resources.get("GPU") else "cpu"
    needs: dict[str, float] = {"GPU": 1} if device == "cuda" else {"CPU": threads}
    [(name, each)] = needs.items()
    has = resources.get(name, 0)
    if has < each * (workers or 1):
        raise ValueError(
            f"the cluster has {has:g} {name}s, and {workers or 1} workers of {each:g} need {each * (workers or 1):g}"
        )
    return Pool(device, workers or int(has // each), needs)


def num_blocks(num_paths: int, workers: int) -> int:
    """Choose the number of blocks of paths."""
    largest = max(MIN_BLOCK, num_paths // MAX_BLOCKS)
    return max(-(-num_paths // largest), min(num_paths, BLOCKS_PER_WORKER * workers))


def detected(paths: Sequence[str], pool: Pool, *arguments: object) -> Iterator[pa.Table]:
    """Yield the rows of all paths, a block at a time, in the order in which they are finished. `arguments`: a Worker's.

    The job cannot continue after a RayError, a worker's own exception, or an ExecutionTimeoutError (half an hour
    without a block).
    """
    DataContext.get_current().enable_progress_bars = False
    count = num_blocks(len(paths), pool.workers)
    done = ray.data.from_items([{"path": as_ascii(path)} for path in paths], override_num_blocks=count).map_batches(
        Worker,
        fn_constructor_args=arguments,
        batch_size=len(paths) // count,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=pool.workers),
        **pool.logical,
    )
    yield from done.iter_batches(batch_size=None, batch_format="pyarrow")


def as_ascii(path: str) -> str:
    """Encode a path of any bytes for Arrow; `from_ascii` decodes it."""
    return quote(path, errors="surrogateescape")


def from_ascii(text: str) -> str:
    return unquote(text, errors="surrogateescape")


def detect(
    pictures: Pictures, results: Results, settings: Settings, tiling: Tiling | None, *,
    address: str | None, workers: int | None, write_every_seconds: float,
) -> int:  # fmt: skip
    """Make the missing rows; return how many pictures could not be read, in this run and before.

    ValueError, OSError, InvalidModel: the job cannot start. RayError: it cannot continue; written rows stay.
    """
    paths, made_with = pictures.paths(), recipe(settings, tiling)
    with results.taken(made_with):
        done, failed = results.done()
        missing = [path for path in paths if shown(path) not in done]
        if not missing:
            return failed
        threads = settings.threads or 1
        connect(address, workers, threads)
        try:
            pool = pool_for(settings.device, workers, threads, ray.cluster_resources())
            model = settings.model_file.absolute()
            settings = settings.model_copy(update={"device": pool.device, "threads": threads, "model": model})
            rows = detected(missing, pool, pictures, settings, tiling, made_with["model_sha256"])
            pause = 0.1 if sys.stderr.isatty() else LOG_SECONDS
            with tqdm(total=len(paths), initial=len(paths) - len(missing), unit="image", mininterval=pause) as progress:
                return failed + write_all(rows, results, progress, write_every_seconds)
        finally:
            ray.shutdown()


def write_all(rows: Iterable[pa.Table], results: Results, progress: "tqdm[Any]", write_every_seconds: float) -> int:
    """Write the rows, one file for each `write_every_seconds`; return how many pictures could not be read."""
    waiting, written, failed = [SCHEMA.empty_table()], time.monotonic(), 0
    try:
        for block in rows:
            for row in block.filter(compute.is_valid(block["unread"])).to_pylist():
                progress.write(printable(f"{row['path']}: {row['unread']}"), file=sys.stderr)
            waiting.append(block.filter(compute.is_null(block["unread"])).select(SCHEMA.names))
            failed += len(block) - waiting[-1]["error"].null_count
            progress.update(len(block))
            if time.monotonic() - written >= write_every_seconds or sum(map(len, waiting)) >= MAX_ROWS_PER_FILE:
                results.add(pa.concat_tables(waiting))
                waiting, written = [SCHEMA.empty_table()], time.monotonic()
    finally:
        results.add(pa.concat_tables(waiting))
    return failed
