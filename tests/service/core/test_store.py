"""The model's life: loaded, swapped, refused, watched; with detectors made by hand."""

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from model.detector import Detector, DeviceUnavailable, InferenceFailed
from model.metadata import InvalidModel
from service.core.store import ModelStore, NotReady
from service.metrics import Metrics
from tests.support.faulty_models import write_hanging_model
from tests.support.serving import FakeDetector, wait_until


@dataclass
class Opener:
    """Opens a file that holds the model's name; a name "bad…" is refused."""

    opened: list[str] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)

    def __call__(self, path: Path) -> FakeDetector:
        if self.errors:
            raise self.errors.pop()
        name = path.read_text()
        self.opened.append(name)
        if name.startswith("bad"):
            raise InvalidModel(f"{name} is not a model")
        return FakeDetector(name, sha256=name * 8)


def make_store(path: Path, opener: Callable[[Path], FakeDetector], **options: object) -> tuple[ModelStore, Metrics]:
    metrics = Metrics()
    return ModelStore(path, opener, metrics, **options), metrics  # type: ignore[arg-type]


@pytest.mark.parametrize(("set_to", "of_device", "largest"), [(None, 1, 1), (None, 8, 8), (4, 8, 4), (4, 1, 4)])
def test_a_batch_is_as_large_as_set_or_as_the_device_gains_from(
    path: Path, set_to: int | None, of_device: int, largest: int
) -> None:
    store, _ = make_store(path, lambda _: FakeDetector(batch_size=of_device), max_batch_size=set_to)
    store.load()
    assert store.serving().max_batch_size == largest


def reloads(metrics: Metrics) -> tuple[float | None, float | None]:
    name = "retinaserve_model_reloads_total"
    values = [metrics.registry.get_sample_value(name, {"outcome": outcome}) for outcome in ("success", "failure")]
    return values[0], values[1]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_text("first")
    return path


def replace(path: Path, text: str) -> None:
    """A new file under the old name, as a careful roll-out does it."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def test_before_the_first_load_nothing_serves(path: Path) -> None:
    store, _ = make_store(path, Opener())
    with pytest.raises(NotReady, match="being loaded"):
        store.serving()


def test_a_loaded_model_serves_and_is_named_in_the_metrics(path: Path) -> None:
    store, metrics = make_store(path, Opener())
    store.load()
    model = store.serving()
    assert (model.name, model.label_names, model.label_ids) == (
        "first",
        {1: "circle", 2: "square"},
        {"circle": 1, "square": 2},
    )
    info = {
        "name": "first",
        "sha256": "first" * 8,
        "precision": "fp32",
        "provider": "CPUExecutionProvider",
        "input": "64/128",
    }
    assert metrics.registry.get_sample_value("retinaserve_model_info", info) == 1


def test_a_reload_swaps_the_model_and_who_holds_the_old_one_keeps_it(path: Path) -> None:
    store, metrics = make_store(path, Opener())
    store.load()
    held = store.serving()
    replace(path, "second")
    assert store.reload()
    assert (held.name, store.serving().name) == ("first", "second")
    assert reloads(metrics) == (1, 0)


@pytest.mark.parametrize(
    "error",
    [InvalidModel("x"), DeviceUnavailable("x"), InferenceFailed("x"), FileNotFoundError("x"), MemoryError("x")],
)
def test_a_model_that_cannot_be_loaded_leaves_the_old_one_serving(path: Path, error: Exception) -> None:
    opener = Opener()
    store, metrics = make_store(path, opener)
    store.load()
    opener.errors.append(error)
    assert not store.reload()
    assert store.serving().name == "first"
    assert reloads(metrics) == (0, 1)


def test_a_model_that_fails_its_warm_up_is_not_swapped_in(path: Path) -> None:
    class Cold(FakeDetector):
        def warm_up(self, max_batch_size: int = 1) -> None:
            raise InferenceFailed("made to fail")

    models: list[FakeDetector] = [Cold("cold"), FakeDetector("warm")]
    store, _ = make_store(path, lambda _: models.pop())
    store.load()
    assert not store.reload()
    assert store.serving().name == "warm"


def test_a_file_that_is_stuck_is_left_behind_and_the_next_one_loaded(path: Path) -> None:
    gate, stuck = threading.Event(), []

    def open_detector(path: Path) -> FakeDetector:
        name = path.read_text()
        if name == "stuck":
            gate.wait(30)
            stuck.append(name)
        return FakeDetector(name)

    store, metrics = make_store(path, open_detector, load_timeout_seconds=0.2, poll_seconds=0.02)
    store.start(pytest.fail)
    wait_until(lambda: store.current is not None)
    replace(path, "stuck")
    wait_until(lambda: reloads(metrics) == (0, 1))
    assert store.serving().name == "first"
    replace(path, "third")
    wait_until(lambda: store.serving().name == "third")
    gate.set()
    wait_until(lambda: stuck == ["stuck"])
    time.sleep(0.1)
    assert store.serving().name == "third", "what comes too late does not serve"
    store.close()


def test_a_warm_up_without_end_is_a_load_without_end(path: Path) -> None:
    gate = threading.Event()

    class Endless(FakeDetector):
        def warm_up(self, max_batch_size: int = 1) -> None:
            gate.wait(30)

    store, _ = make_store(path, lambda _: Endless(), load_timeout_seconds=0.1)
    with pytest.raises(TimeoutError, match=r"within 0\.1 s"):
        store.load()
    gate.set()


@pytest.mark.slow
def test_a_warm_up_that_is_given_up_ends(path: Path) -> None:
    write_hanging_model(path, on_white=False)
    store = ModelStore(path, partial(Detector, device="cpu", threads=1), Metrics(), load_timeout_seconds=1)
    with pytest.raises(TimeoutError):
        store.load()
    wait_until(lambda: not store.is_opening)


def test_a_file_is_not_tried_again_while_it_is_stuck_in_being_opened(path: Path) -> None:
    gate, opened = threading.Event(), []

    def open_detector(path: Path) -> FakeDetector:
        opened.append(path)
        gate.wait(30)
        return FakeDetector()

    store, _ = make_store(path, open_detector, load_timeout_seconds=0.1)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            store.load()
    assert len(opened) == 1
    gate.set()
    wait_until(lambda: not store.is_opening)
    store.load()
    assert len(opened) == 2


def test_a_changed_file_is_loaded_by_itself_and_a_bad_one_is_tried_once(path: Path) -> None:
    opener = Opener()
    store, metrics = make_store(path, opener, poll_seconds=0.02)
    store.start(pytest.fail)
    wait_until(lambda: store.current is not None)
    replace(path, "second")
    wait_until(lambda: store.serving().name == "second")
    replace(path, "bad")
    wait_until(lambda: reloads(metrics) == (1, 1))
    for _ in range(3):
        wait_until_polled(store)
    assert reloads(metrics) == (1, 1)
    path.unlink()
    replace(path, "third")
    wait_until(lambda: store.serving().name == "third")
    store.close()
    assert opener.opened == ["first", "second", "bad", "third"]


def differs(metrics: Metrics) -> bool:
    return metrics.registry.get_sample_value("retinaserve_model_wanted_differs") == 1


def test_a_link_that_leads_nowhere_is_a_failure_as_long_as_it_lasts(tmp_path: Path) -> None:
    (tmp_path / "first.onnx").write_text("first")
    link = tmp_path / "current.onnx"
    link.symlink_to("first.onnx")
    store, metrics = make_store(link, Opener(), poll_seconds=0.02)
    store.start(pytest.fail)
    wait_until(lambda: store.current is not None)
    (tmp_path / "next").symlink_to("typo.onnx")
    (tmp_path / "next").rename(link)
    wait_until(lambda: reloads(metrics) == (0, 1))
    assert differs(metrics)
    assert store.serving().name == "first"
    for _ in range(3):
        wait_until_polled(store)
    assert (reloads(metrics), differs(metrics)) == ((0, 1), True)
    (tmp_path / "next").symlink_to("first.onnx")
    (tmp_path / "next").rename(link)
    wait_until(lambda: not differs(metrics))
    store.close()


def test_changed_rights_are_a_change(path: Path) -> None:
    opener = Opener()
    store, _ = make_store(path, opener, poll_seconds=0.02)
    store.start(pytest.fail)
    wait_until(lambda: store.current is not None)
    path.chmod(0o640)
    wait_until(lambda: opener.opened == ["first", "first"])
    store.close()


def test_a_failure_that_passes_is_mended_by_itself_and_logged_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opener = Opener()
    store, metrics = make_store(path, opener, poll_seconds=0.02, first_retry_seconds=0.02)
    store.start(pytest.fail)
    wait_until(lambda: store.current is not None)
    opener.errors.extend([InferenceFailed("out of memory") for _ in range(3)])
    replace(path, "second")
    wait_until(lambda: store.serving().name == "second")
    wait_until(lambda: not differs(metrics))
    store.close()
    assert reloads(metrics) == (1, 3)
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "the model was not reloaded, the old one serves on: out of memory"
    ]


def test_a_file_that_still_grows_is_left_alone(path: Path) -> None:
    opener = Opener()
    store, _ = make_store(path, opener, poll_seconds=0.1)
    store.start(pytest.fail)
    wait_until(lambda: store.current is not None)
    with path.open("w") as slow:
        for letter in "half":
            slow.write(letter)
            slow.flush()
            os.utime(path, ns=(0, ord(letter)))  # as if the writes were farther apart than the clock's grain
            wait_until_polled(store)
        replace(path, "whole")
    wait_until(lambda: store.serving().name == "whole")
    store.close()
    assert opener.opened == ["first", "whole"]


def wait_until_polled(store: ModelStore) -> None:
    store.wake.set()
    wait_until(lambda: not store.wake.is_set())


def test_asked_to_reload_it_does_so_even_if_nothing_changed(path: Path) -> None:
    opener = Opener()
    store, metrics = make_store(path, opener)
    store.start(pytest.fail)
    wait_until(lambda: store.current is not None)
    store.ask_reload()
    wait_until(lambda: reloads(metrics) == (1, 0))
    store.close()
    assert opener.opened == ["first", "first"]


def test_a_first_load_that_fails_says_why(path: Path) -> None:
    path.write_text("bad")
    store, _ = make_store(path, Opener())
    reasons: list[str] = []
    store.start(reasons.append)
    wait_until(lambda: reasons == ["bad is not a model"])
    with pytest.raises(NotReady):
        store.serving()


def test_a_device_fault_ends_the_serving(path: Path) -> None:
    store, _ = make_store(path, Opener())
    store.load()
    store.device_fault = "context lost"
    with pytest.raises(NotReady, match="context lost"):
        store.serving()


def test_a_symbolic_link_that_is_pointed_elsewhere_counts_as_a_change(tmp_path: Path) -> None:
    """As Kubernetes does it with mounted volumes."""
    for name in ("first", "second"):
        (tmp_path / name).write_text(name)
    shutil.copystat(tmp_path / "first", tmp_path / "second")
    link = tmp_path / "model.onnx"
    link.symlink_to("first")
    store, _ = make_store(link, Opener(), poll_seconds=0.02)
    store.start(pytest.fail)
    wait_until(lambda: store.current is not None)
    (tmp_path / "new").symlink_to("second")
    (tmp_path / "new").replace(link)
    wait_until(lambda: store.serving().name == "second")
    store.close()
