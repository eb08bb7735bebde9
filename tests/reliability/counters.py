"""Every counter of /metrics against what the clients know: none is wrong, and none counts what nobody can explain."""

import collections
import random
import signal
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from model.tiles import Tiling, num_windows
from service.api.errors import OUTCOME_OF_STATUS
from service.api.paths import DETECTION_ROUTES, route_of
from service.metrics import STAGES, UNMATCHED
from tests.reliability.gate import Figures, Work
from tests.support.load import PNG, Scrape, ask
from tests.support.serving import ServerProcess, server_process, wait_until
from tests.support.tiny_model import write_tiny_model
from tests.system import test_soak as forms
from tests.system.test_cross_talk import answers

CLIENTS = 16
KEPT_BY = ("process_", "python_")
"""Not ours: counters of the process."""
TIMES = ("seconds_sum", "seconds_bucket")
"""No client knows these to the digit."""
Sample = tuple[str, tuple[tuple[str, str], ...]]


class Books(collections.Counter[Sample]):
    """The clients' own count of each counter."""

    lock = threading.Lock()

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        with self.lock:
            self[name, tuple(sorted(labels.items()))] += amount  # type: ignore[assignment]

    def exchange(self, method: str, path: str, status: int) -> None:
        """Write down any request and its answer."""
        route = route_of(path.partition("?")[0])
        route = route if route in {*DETECTION_ROUTES, *OTHER_ROUTES} else UNMATCHED
        self.add("http_requests_total", method=method, route=route, status=str(status))
        if method == "POST" and route in DETECTION_ROUTES:
            self.add("retinaserve_requests_total", outcome=OUTCOME_OF_STATUS[status])
            self.add("http_request_duration_seconds_count", method=method, route=route)

    def answered(self, size: tuple[int, int], detections: int, canvases: int) -> None:
        """Write down a picture that got its detections."""
        for stage in STAGES:
            self.add("retinaserve_stage_duration_seconds_count", stage=stage)
        for name, amount in (("detections", detections), ("images", 1)):
            self.add(f"retinaserve_{name}_total", amount)
        for name, amount in (("detections_per_image", detections), ("image_pixels", size[0] * size[1])):
            self.add(f"retinaserve_{name}_sum", amount)
            self.add(f"retinaserve_{name}_count")
        for end in ("sum", "count"):
            self.add(f"retinaserve_batch_size_{end}", canvases)  # a batch is one canvas here


OTHER_ROUTES = ("/metrics", "/model", "/healthz", "/readyz", "/docs")


@dataclass(frozen=True)
class Kind:
    """A request, and what is known of it beforehand."""

    path: str
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=lambda: PNG)
    size: tuple[int, int] = (20, 16)
    tile: int = 0
    drawn: bool = False
    """The answer is a picture, without detections."""

    def ask(self, url: str, books: Books) -> None:
        method = "GET" if self.body is None else "POST"
        reply = ask(url, self.path, self.body, self.headers, method=method)
        books.exchange(method, self.path, reply.status)
        if method == "POST" and reply.status in (200, 422) and not self.path.startswith("/detect?label"):
            books.add("http_request_size_bytes_sum", len(self.body or b""))
            books.add("http_request_size_bytes_count")
        if method == "POST" and reply.status == 200:
            books.add("retinaserve_request_duration_seconds_count")
            windows = num_windows(*self.size[::-1], Tiling(self.tile)) if self.tile else 0
            for found in [[]] if self.drawn else answers(reply):
                books.answered(self.size, len(found), 1 + windows)


KINDS = (
    Kind("/detect", forms.IMAGE), Kind("/detect", forms.FORM, forms.FORM_TYPE),
    Kind("/detect/batch", forms.FORM, forms.FORM_TYPE), Kind("/detect", forms.BASE64, forms.JSON_TYPE),
    Kind("/", forms.HUGGING_FACE, forms.JSON_TYPE), Kind(forms.INFER, forms.FILES_JSON, forms.JSON_TYPE),
    Kind(forms.INFER, forms.FRAME_HEAD + bytes(192), forms.FRAME_TYPE, (8, 8)),
    Kind("/detect?tile=64", forms.WINDOWS, PNG, (100, 80), tile=64), Kind("/detect", forms.PHOTO, {}, (640, 480)),
    Kind("/detect?score_threshold=1", forms.IMAGE, forms.DRAWN, drawn=True),
    Kind("/detect", b"no image"), Kind("/detect?label=unknown", forms.IMAGE), Kind("/metrics"), Kind("/model"),
    Kind("/healthz"), Kind("/unknown/path"), Kind("/docs"),
)  # fmt: skip


def reload(server: ServerProcess, books: Books) -> None:
    """Swap the model for a bad file, and back."""
    good = server.model_path.read_bytes()
    for content, outcome in ((good[:1000], "failure"), (good, "success")):
        server.model_path.with_suffix(".new").write_bytes(content)
        server.model_path.with_suffix(".new").replace(server.model_path)
        before = scraped(server, books)("retinaserve_model_reloads_total", outcome=outcome)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: scraped(server, books)("retinaserve_model_reloads_total", outcome=outcome) > before)  # noqa: B023
        books.add("retinaserve_model_reloads_total", outcome=outcome)


def scraped(server: ServerProcess, books: Books) -> Scrape:
    books.exchange("GET", "/metrics", 200)
    return Scrape(server.url)


def unexplained(before: Scrape, after: Scrape, books: Books) -> dict[Sample, tuple[float, float]]:
    """Counters that grew by another number than the books say: (grown by, books)."""
    grown = {sample: value - before.samples.get(sample, 0) for sample, value in after.samples.items() if counts(sample)}
    return {
        sample: (grown.get(sample, 0), books[sample])
        for sample in {*grown, *books}
        if grown.get(sample, 0) != books[sample]
    }


def counts(sample: Sample) -> bool:
    name = sample[0]
    return name.endswith(("_total", "_count", "_sum")) and not name.startswith(KEPT_BY) and not name.endswith(TIMES)


def compare_counters(folder: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Ask so many requests of every kind, with reloads between; the numbers of requests and of counters compared."""
    write_tiny_model(folder / "tiny.onnx")
    chance, books = random.Random(seed), Books()
    kinds = [chance.choice(KINDS) for _ in range(count)]
    flags = ("--threads", "1", "--queue-capacity", "100", "--model-poll-seconds", "0", "--runs-at-once", "1")
    with server_process(folder, *flags, model_path=folder / "tiny.onnx") as server, ThreadPoolExecutor(CLIENTS) as pool:
        before = scraped(server, books)
        for half in (kinds[: count // 2], kinds[count // 2 :]):
            list(pool.map(lambda kind: kind.ask(server.url, books), half))
            reload(server, books)
        after = Scrape(server.url)
    found = unexplained(before, after, books)
    assert not found, found
    return {"requests": count, "counters_compared": sum(map(counts, after.samples)), "that_had_counted": len(+books)}


def run(work: Work) -> Figures:
    return compare_counters(work.folder, work.count, work.first)
