"""How many CPUs this process may really use: cgroup quota and affinity, not the machine's core count."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
CGROUP_V1 = Path("/sys/fs/cgroup/cpu")


def cpu_quota(v2: Path = CGROUP_V2, v1: Path = CGROUP_V1) -> float:
    """CPUs that the cgroup (v2 or v1) and the affinity mask leave to this process, in cores; may be a fraction."""
    cores = float(len(os.sched_getaffinity(0)))
    return min(cores, _quota_v2(v2) or cores, _quota_v1(v1) or cores)


def compute_threads() -> int:
    """Threads for computing: the quota rounded up, at least one."""
    return max(1, math.ceil(cpu_quota()))


def _quota_v2(path: Path) -> float | None:
    try:
        quota, period = path.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text(encoding="ascii"))
        period = int((folder / "cpu.cfs_period_us").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 else None
