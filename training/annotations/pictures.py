"""Checks before a run that a data set's pictures exist and can be read."""

import logging
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from model.image import MAX_PIXELS
from training.coco import CocoDataSet, InvalidDataSet
from training.distributed import ALONE, Ranks

log = logging.getLogger(__name__)
SKIP = "--unreadable skip continues without them"


def refuse_absent(data_set: CocoDataSet, *, skip: bool) -> None:
    """Raise InvalidDataSet if files are missing or too large to decode; with `skip`, if all are. None is decoded."""
    _refuse(data_set, list(_absent(data_set)), skip=skip)


def refuse_unreadable(data_set: CocoDataSet, *, skip: bool, ranks: Ranks = ALONE) -> None:
    """Decode every picture, divided among the ranks. InvalidDataSet: some cannot be read; with `skip`, none can."""
    indices = ranks.share(range(len(data_set)))
    problems = []
    what = f"check {data_set.split} pictures"
    for index in tqdm(indices, desc=what, unit="picture", leave=False, disable=not ranks.is_first):
        try:
            data_set.read(index)
        except InvalidDataSet as error:
            problems.append(str(error))
    _refuse(data_set, ranks.gather(problems), skip=skip)


def _absent(data_set: CocoDataSet) -> Iterator[str]:
    for picture in data_set.pictures:
        pixels = picture.size[0] * picture.size[1]
        if not picture.file.is_file():
            yield f"{picture.file} (id {picture.image_id}) is not there"
        elif pixels > MAX_PIXELS:
            yield f"{picture.file} (id {picture.image_id}) has {pixels:,} pixels, {MAX_PIXELS:,} are allowed"


def _refuse(data_set: CocoDataSet, problems: Sequence[str], *, skip: bool) -> None:
    if not problems:
        return
    count = f"{len(problems)} of the {len(data_set)} pictures of {data_set.annotation_file} cannot be read"
    if not skip:
        raise InvalidDataSet(f"{count}, the first: {problems[0]}; {SKIP}")
    if len(problems) == len(data_set):
        raise InvalidDataSet(f"{count}, so nothing is left: {problems[0]}")
    log.warning("%s and are skipped, the first: %s", count, problems[0])
