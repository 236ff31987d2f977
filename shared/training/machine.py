"""What a training record says about the machine, and about several runs together."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, least and largest, and how many there are."""
    return {"mean": float(np.mean(values)), "min": min(values), "max": max(values), "runs": float(len(values))}


def cpu_name() -> str:
    """Model name of this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
