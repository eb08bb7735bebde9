"""The results of a batch job: a folder of Parquet files, on this machine or in an object store.

`part-*.parquet` hold the rows, and `_recipe.json` the model and options that made them. The rows are the checkpoint: a
picture with a row is done. One process writes, and each file appears whole or not at all. So a job may be killed at any
moment, and no picture has two rows.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import numpy as np
import pyarrow as pa
from pyarrow import dataset, fs, parquet

from cluster.pictures import is_local, open_store
from model.files import replacing, write_whole
from model.types import Detections, coco_results
from service.detect import image_id_of, rounded
from service.outputs import check_outputs

DETECTION = pa.struct(
    [("label", pa.string()), ("class_id", pa.int64()), ("score", pa.float32())]
    + [(side, pa.float32()) for side in ("xmin", "ymin", "xmax", "ymax")]
)
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("model_sha256", pa.string()),
        ("detections", pa.list_(DETECTION)),
        ("error", pa.string()),
    ]
)
"""Schema of the rows. Width, height and boxes are in pixels of the upright picture, as in `POST /detect`; best score
first. A picture that cannot be decoded has an `error`, no detections, and no size."""
RECIPE = "_recipe.json"
ROWS_AT_ONCE = 1000
"""Rows that become Python objects at once."""


@dataclass(frozen=True)
class Results:
    """The rows in the folder DEST."""

    files: fs.FileSystem
    folder: str

    @classmethod
    def at(cls, place: str) -> Self:
        """Open DEST, which need not exist. ValueError, OSError: the store does not exist."""
        return cls(*open_store(place))

    @contextmanager
    def taken(self, recipe: Mapping[str, Any]) -> Iterator[None]:
        """Lock DEST within this context, for rows of this recipe only.

        ValueError: its rows have another recipe, or are not ours. OSError: it cannot be written, or another job of this
        machine writes there.
        """
        with ExitStack() as held:
            self.files.create_dir(self.folder)
            if is_local(self.files):
                held.enter_context(_locked(Path(self.folder)))
            if self._has(RECIPE):
                self._refuse_other(recipe)
            elif self._parts():
                raise ValueError(f"{self.folder} holds Parquet files that no batch job wrote: write elsewhere")
            else:
                self._put(RECIPE, json.dumps(recipe, indent=1).encode())
            yield

    def done(self) -> tuple[set[str], int]:
        """Return the paths that have a row, and how many rows have an error. All paths are held in memory."""
        rows = self._table(["path", "error"])
        return set(rows["path"].to_pylist()), len(rows) - rows["error"].null_count

    def add(self, rows: pa.Table) -> None:
        """Write a file with the rows, if there are any."""
        if len(rows):
            content = pa.BufferOutputStream()
            parquet.write_table(rows, content)
            self._put(f"part-{uuid4().hex}.parquet", content.getvalue().to_pybytes())

    def write_coco(self, out: Path) -> int:
        """Write the detections as COCO results, in order of path; return how many rows have an error instead.

        ValueError: there are no rows, or two paths have one image_id.
        """
        check_outputs([Path(part) for part in self._parts()], [out])
        rows = self._table(["path", "detections", "error"]).sort_by("path")
        if not len(rows):
            raise ValueError(f"{self.folder} has no results")
        _refuse_shared_ids(rows["path"].to_pylist())
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary, temporary.open("w") as file:
            file.write("[")
            for number, result in enumerate(_coco(rows)):
                file.write(", " * bool(number) + json.dumps(result))
            file.write("]\n")
        return len(rows) - int(rows["error"].null_count)

    def _refuse_other(self, recipe: Mapping[str, Any]) -> None:
        with self.files.open_input_stream(f"{self.folder}/{RECIPE}") as file:
            found = json.loads(file.read())
        differing = [
            f"{name} {found.get(name)}, not {value}" for name, value in recipe.items() if found.get(name) != value
        ]
        if differing:
            raise ValueError(f"the rows of {self.folder} are made with {'; '.join(differing)}: write elsewhere")

    def _has(self, name: str) -> bool:
        return bool(self.files.get_file_info(f"{self.folder}/{name}").is_file)

    def _parts(self) -> list[str]:
        below = self.files.get_file_info(fs.FileSelector(self.folder, allow_not_found=True))
        return [each.path for each in below if each.is_file and each.base_name.endswith(".parquet")]

    def _table(self, columns: Sequence[str]) -> pa.Table:
        return dataset.dataset(self._parts(), SCHEMA, "parquet", self.files).to_table(list(columns))

    def _put(self, name: str, content: bytes) -> None:
        path = f"{self.folder}/{name}"
        if is_local(self.files):
            write_whole(Path(path), content)
        else:  # an object appears when its last byte has come
            with self.files.open_output_stream(path) as file:
                file.write(content)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock out other jobs of this machine, and delete unfinished files of a killed one. BlockingIOError: it is
    locked."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"another job is writing to {folder}") from error
        for unfinished in (*folder.glob(".part-*"), *folder.glob(f".{RECIPE}.*")):
            unfinished.unlink()
        yield


def _refuse_shared_ids(paths: Sequence[str]) -> None:
    owners: dict[int | str, str] = {}
    for path in paths:
        image_id = image_id_of(Path(path))
        if (owner := owners.setdefault(image_id, path)) != path:
            raise ValueError(f"{owner} and {path} would have the same image_id {image_id!r}")


def _coco(rows: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in rows.to_batches(ROWS_AT_ONCE):
        for row in batch.to_pylist():
            for result in coco_results(image_id_of(Path(row["path"])), _detections(row["detections"])):
                yield rounded(result)


def _detections(found: Sequence[Mapping[str, Any]]) -> Detections:
    boxes = [[each["xmin"], each["ymin"], each["xmax"], each["ymax"]] for each in found]
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array([each["score"] for each in found], np.float32),
        np.array([each["class_id"] for each in found], np.int64),
    )
