"""Cores: how many this process may use."""

import os
from pathlib import Path


def available_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores this process may use: its affinity, and its container's quota rounded down (throttling costs more than an
    idle core); at least 1."""
    cores = len(os.sched_getaffinity(0))
    quota = _cgroup_quota(cgroup)
    return cores if quota is None else max(1, min(cores, int(quota)))


def _cgroup_quota(cgroup: Path) -> float | None:
    """Cores, or None where there is no limit. Version 2 keeps both numbers in one file, version 1 in two."""
    unified, legacy = cgroup / "cpu.max", cgroup / "cpu"
    if unified.exists():
        quota, period = unified.read_text().split()
    elif (legacy / "cpu.cfs_quota_us").exists():
        quota, period = ((legacy / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    else:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
