"""What a servicer asks of the call that it answers."""

from __future__ import annotations

import time
from typing import Any


def deadline_of(context: Any) -> float:
    """time.monotonic() at which the caller's deadline passes; infinity without one."""
    remaining = context.time_remaining()
    return float("inf") if remaining is None else time.monotonic() + float(remaining)
