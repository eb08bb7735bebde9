import os
from pathlib import Path

import pytest

from model.runtime.cores import available_cores


def quota_files(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    return folder


def legacy(quota: str) -> dict[str, str]:
    return {"cpu/cpu.cfs_quota_us": f"{quota}\n", "cpu/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, 1000),
        ({"cpu.max": "max 100000\n"}, 1000),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "290000 100000\n"}, 2),
        ({"cpu.max": "99900000 100000\n"}, 999),
        (legacy("-1"), 1000),
        (legacy("100000"), 1),
        (legacy("20000"), 1),
    ],
)
def test_cores_are_those_of_affinity_and_quota(tmp_path: Path, files: dict[str, str], quota: int) -> None:
    assert available_cores(quota_files(tmp_path, files)) == min(len(os.sched_getaffinity(0)), quota)
