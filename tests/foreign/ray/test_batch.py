"""`python -m cluster` on a real Ray on this machine: killed, resumed, refused. Run by `make test-foreign`."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import ray
from pyarrow import dataset, fs
from ray.cluster_utils import Cluster
from tqdm import tqdm

from cluster.__main__ import main
from cluster.batch import Pool, Worker, as_ascii, num_blocks, pool_for, recipe, write_all
from cluster.pictures import Pictures
from cluster.results import SCHEMA, Results
from service.__main__ import main as service
from service.config import Settings
from tests.support.pictures import encode, picture
from tests.support.serving import wait_until
from tests.support.tiny_model import write_tiny_model

ROOT = Path(__file__).parents[3]
NUM_PICTURES = 2000
THRESHOLDS = ("--score-threshold", "0.2", "--max-detections", "20")


def draw(folder: Path, numbers: Sequence[int]) -> None:
    """Small pictures of several sizes, in folders."""
    for number in numbers:
        file = folder / str(number % 7) / f"{number:05}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(picture(40 + number % 5, 60 + number % 3, seed=number), "PNG"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    write_tiny_model(path)
    return str(path)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    draw(folder, range(NUM_PICTURES - 1))
    (folder / "3" / "broken.png").write_bytes(encode(picture(), "PNG")[:90])
    (folder / "3" / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two CPUs."""
    running = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        yield running.address
    finally:
        running.shutdown()


def job(source: Path, dest: Path, *flags: str) -> "subprocess.Popen[str]":
    """In a session of its own, so that all of its processes can be killed at once."""
    command = [sys.executable, "-m", "cluster", "detect", str(source), "--out", str(dest), *flags]
    return subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT
    )


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}


def finish(source: Path, dest: Path, *flags: str) -> tuple[int, str]:
    """The exit code, and what it said."""
    running = job(source, dest, *flags)
    said = running.communicate(timeout=240)[1]
    return running.returncode, said


def kill_after_a_file(running: "subprocess.Popen[str]", dest: Path) -> None:
    """SIGKILL for all of its processes, as soon as it has written one file more."""
    before = len(parts(dest))
    wait_until(lambda: running.poll() is not None or len(parts(dest)) > before, 240)
    os.killpg(running.pid, signal.SIGKILL)
    said = running.communicate()[1]
    assert running.returncode == -signal.SIGKILL, said


def parts(dest: Path) -> list[Path]:
    return sorted(dest.glob("part-*.parquet"))


def rows(dest: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = dataset.dataset([str(part) for part in parts(dest)], SCHEMA).to_table().to_pylist()
    return found


def by_image(results: Path) -> dict[int | str, list[dict[str, Any]]]:
    """COCO results of each image, in their order."""
    grouped = defaultdict(list)
    for result in json.loads(results.read_text()):
        grouped[result["image_id"]].append(result)
    return grouped


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which this ends, with code 2."""
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("python -m cluster: error: ") and said.count("\n") == 1
    return said


def test_a_job_that_is_killed_twice_has_each_picture_once_with_the_answers_of_service_detect(
    archive: Path, model: str, tmp_path: Path
) -> None:
    dest, flags = tmp_path / "rows", ("--model", model, *THRESHOLDS, "--write-every-seconds", "0.2")
    counts = [0]
    for _ in range(2):
        kill_after_a_file(job(archive, dest, *flags), dest)
        counts.append(len(rows(dest)))
    assert 0 < counts[1] < counts[2] < NUM_PICTURES
    code, said = finish(archive, dest, *flags)
    assert (code, said.splitlines()[-1]) == (1, "1 pictures could not be read")
    done = rows(dest)
    assert sorted(row["path"] for row in done) == sorted(str(path) for path in archive.rglob("*.png"))
    assert len(done) == NUM_PICTURES
    [broken] = [row for row in done if row["error"] is not None]
    assert broken["path"].endswith("broken.png") and "cut off or damaged" in broken["error"]
    assert (broken["detections"], broken["width"], broken["height"]) == ([], None, None)
    assert {(row["width"], row["height"]) for row in done if row["path"].endswith("00011.png")} == {(62, 41)}
    assert {row["model_sha256"] for row in done} == {recipe(Settings(model=Path(model)), None)["model_sha256"]}

    assert main(["coco", str(dest), "--out", str(tmp_path / "coco.json")]) == 0
    expected = tmp_path / "expected.json"
    assert service(["detect", str(archive), "--model", model, *THRESHOLDS, "--out", str(expected)]) == 1
    assert by_image(tmp_path / "coco.json") == by_image(expected)
    assert len(by_image(expected)) > NUM_PICTURES / 2


@pytest.fixture(scope="module")
def finished(cluster: str, model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of 20 pictures and their rows, made on the cluster."""
    folder = tmp_path_factory.mktemp("finished")
    draw(folder / "pictures", range(20))
    code, said = finish(folder / "pictures", folder / "rows", "--model", model, "--address", cluster)
    assert code == 0, said
    assert len(rows(folder / "rows")) == 20
    return folder / "pictures", folder / "rows"


def test_a_finished_picture_keeps_its_row_when_it_is_gone_and_only_the_new_are_done(
    cluster: str, model: str, finished: tuple[Path, Path]
) -> None:
    pictures, dest = finished
    before = {part: part.read_bytes() for part in parts(dest)}
    (pictures / "3" / "00003.png").unlink()
    draw(pictures, [20, 21])
    (dest / ".part-half.parquet.99").write_bytes(b"PAR1 and no more")
    assert finish(pictures, dest, "--model", model, "--address", cluster)[0] == 0
    assert {part: part.read_bytes() for part in before} == before
    assert sorted(Path(row["path"]).stem for row in rows(dest)) == [f"{number:05}" for number in range(22)]
    assert not list(dest.glob(".part-*"))


def test_a_cluster_with_too_few_cpus_is_refused(cluster: str, model: str, archive: Path, tmp_path: Path) -> None:
    code, said = finish(archive, tmp_path / "rows", "--model", model, "--address", cluster, "--workers", "3")
    assert code == 2
    assert "the cluster has 2 CPUs, and 3 workers of 1 need 3" in said.splitlines()[-1]
    assert parts(tmp_path / "rows") == []


@pytest.mark.parametrize(
    ("device", "workers", "threads", "text"),
    [("cpu", None, 3, "has 2 CPUs, and 1 workers of 3 need 3"), ("cuda", None, 1, "has 0 GPUs")],
)
def test_workers_that_do_not_fit_are_refused(device: str, workers: int | None, threads: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        pool_for(device, workers, threads, {"CPU": 2, "memory": 1e9})


def test_there_is_a_worker_for_each_cpu_or_gpu_unless_told() -> None:
    assert pool_for("auto", None, 2, {"CPU": 9}) == Pool("cpu", 4, {"CPU": 2})
    assert pool_for("cuda", None, 1, {"CPU": 64, "GPU": 8}).logical == {"num_gpus": 1}
    assert pool_for("cpu", 3, 1, {"CPU": 64}).workers == 3


def test_a_worker_that_dies_is_replaced_and_no_picture_is_lost_or_done_twice(
    cluster: str, model: str, archive: Path, tmp_path: Path
) -> None:
    dest = tmp_path / "rows"
    with job(archive / "3", dest, "--model", model, "--address", cluster, "--write-every-seconds", "0") as running:
        wait_until(lambda: running.poll() is not None or bool(parts(dest)), 240)
        next(each for each in psutil.process_iter() if "ray::MapWorker" in each.name()).kill()
        assert running.wait(240) == 1
    assert sorted(row["path"] for row in rows(dest)) == sorted(str(path) for path in (archive / "3").glob("*.png"))


@pytest.mark.parametrize(
    ("num_paths", "workers", "count"),
    [(1, 8, 1), (20, 2, 16), (2000, 2, 125), (10**6, 100, 10_000), (10**5, 2000, 16_000)],
)
def test_paths_are_shared_out_in_pieces_that_keep_all_workers_busy(num_paths: int, workers: int, count: int) -> None:
    assert num_blocks(num_paths, workers) == count


def test_rows_of_another_model_or_threshold_are_not_mixed(
    model: str, finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, dest = map(str, finished)
    write_tiny_model(tmp_path / "other.onnx", seed=1)
    said = error_of(capsys, "detect", pictures, "--out", dest, "--model", str(tmp_path / "other.onnx"))
    assert f"the rows of {dest} are made with model_sha256 " in said and said.endswith(": write elsewhere\n")
    for flags, text in (
        (["--score-threshold", "0.4"], "score_threshold 0.05, not 0.4"),
        (["--tile", "64"], "tile None"),
    ):
        assert text in error_of(capsys, "detect", pictures, "--out", dest, "--model", model, *flags)


def test_two_jobs_do_not_write_to_one_place(
    model: str, finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, dest = finished
    with (dest / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another job is writing" in error_of(
            capsys, "detect", str(pictures), "--out", str(dest), "--model", model
        )


def test_what_cannot_be_done_is_one_line_and_code_2(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path / "pictures", [1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "a.parquet").write_bytes(b"PAR1")
    pictures, rows = str(tmp_path / "pictures"), str(tmp_path / "rows")
    for source, dest, flags, text in (
        (str(tmp_path / "none"), rows, [], "does not exist, or has no images"),
        (str(tmp_path / "empty"), rows, [], "does not exist, or has no images"),
        ("nowhere://bucket/photos", rows, [], "nowhere"),
        (pictures, str(tmp_path / "pictures" / "1" / "00001.png"), [], "00001.png"),
        (pictures, "/proc/rows", [], "/proc/rows"),
        (pictures, str(tmp_path / "foreign"), [], "no batch job wrote"),
        (pictures, rows, ["--model", str(tmp_path / "none.onnx")], "none.onnx"),
        (pictures, rows, ["--overlap", "0.2"], "an overlap needs a tile"),
        (pictures, rows, ["--workers", "0"], "no number above 0"),
    ):
        assert text in error_of(capsys, "detect", source, "--out", dest, "--model", model, *flags)
    assert not ray.is_initialized()
    assert "has no results" in error_of(capsys, "coco", str(tmp_path / "empty"), "--out", str(tmp_path / "coco.json"))


def test_results_of_two_pictures_of_one_id_are_refused(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(tmp_path / folder / "00042.png") for folder in "ab"]
    results = Results.at(str(tmp_path / "rows"))
    with results.taken({}):
        results.add(pa.Table.from_pylist([{"path": path} for path in paths], SCHEMA))
    said = error_of(capsys, "coco", str(tmp_path / "rows"), "--out", str(tmp_path / "coco.json"))
    assert "would have the same image_id 42" in said


def work(model: str, pictures: Pictures, *paths: str) -> pa.Table:
    """The rows that a worker makes of these."""
    settings = Settings(model=Path(model), device="cpu", threads=1)
    worker = Worker(pictures, settings, None, recipe(settings, None)["model_sha256"])
    return worker(pa.table({"path": [as_ascii(path) for path in paths]}))


def test_a_picture_that_is_not_there_now_gets_no_row_and_is_told(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path, [0])
    made = work(model, Pictures.at(str(tmp_path)), str(tmp_path / "0" / "00000.png"), str(tmp_path / "gone.png"))
    results = Results.at(str(tmp_path / "rows"))
    with results.taken({}), tqdm(disable=True) as progress:
        assert write_all([made], results, progress, 60) == 1
    assert results.done() == ({str(tmp_path / "0" / "00000.png")}, 0)
    assert "gone.png: [Errno 2] No such file" in capsys.readouterr().err


def test_names_that_are_no_utf8_have_rows_and_are_done_once(model: str, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    (tmp_path / name).write_bytes(encode(picture(), "PNG"))
    pictures = Pictures.at(str(tmp_path))
    [row] = work(model, pictures, *pictures.paths()).to_pylist()
    assert (row["path"], row["error"]) == (f"{tmp_path}/\\xff.png", None)


def test_an_object_store_is_listed_by_endings_read_and_written(model: str, tmp_path: Path) -> None:
    """A folder that is not known to be local stands in for S3 and GCS, of which none was run."""
    draw(tmp_path / "bucket" / "photos", [0, 1])
    (tmp_path / "bucket" / "photos" / "list").write_text("no picture")
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    pictures = Pictures(store, "bucket/photos", "s3://")
    assert pictures.paths() == ["s3://bucket/photos/0/00000.png", "s3://bucket/photos/1/00001.png"]
    made = work(model, pictures, *pictures.paths())
    assert made["error"].null_count == made["unread"].null_count == 2
    results = Results(store, "bucket/rows")
    for _ in range(2):
        with results.taken({"model": 1}):
            results.add(made.select(SCHEMA.names))
    assert results.done() == (set(pictures.paths()), 0)
    with pytest.raises(ValueError, match="made with model 1, not 2"), results.taken({"model": 2}):
        pass
