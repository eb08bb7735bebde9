"""The number of cores that this process may use."""

import os
from pathlib import Path


def available_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the cores that this process may use, at least 1: its affinity, limited by its container's quota. The quota
    is rounded down, because throttling costs more than an idle core."""
    cores = len(os.sched_getaffinity(0))
    quota = _cgroup_quota(cgroup)
    return cores if quota is None else max(1, min(cores, int(quota)))


def _cgroup_quota(cgroup: Path) -> float | None:
    """Read the quota in cores; None: there is no limit. Cgroups version 2 keep it in one file, version 1 in two."""
    unified, legacy = cgroup / "cpu.max", cgroup / "cpu"
    if unified.exists():
        quota, period = unified.read_text().split()
    elif (legacy / "cpu.cfs_quota_us").exists():
        quota, period = ((legacy / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    else:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
