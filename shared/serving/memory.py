"""How much memory the loaded sessions hold: estimated at load, counted until a session is really gone.

ONNX Runtime does not say what a session holds. So the estimate is what the process grew by while the session was opened
and warmed with its largest batch (resident minus shared pages; loads never overlap), and at least the size of the file.
Memory that was freed before and is used again does not show as growth, so the largest figure that a file ever gave
counts. What graphs with free inner dimensions take beyond their warm-up is not in it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import weakref
from pathlib import Path

STATM = Path("/proc/self/statm")
_REMEMBERED = 256


def private_bytes() -> int:
    """Memory that only this process has, in bytes; 0 where /proc does not tell."""
    try:
        fields = STATM.read_text(encoding="ascii").split()
        return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def return_free_memory() -> None:
    """Gives pages that the C library keeps for later back to the system, where it is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class SessionMemory:
    """The ledger of one process's sessions.

    Args:
        limit: bytes that all sessions together may hold; 0 means no limit.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self._held: dict[int, int] = {}
        self._seen: dict[str, int] = {}

    @property
    def total(self) -> int:
        """Bytes of all sessions that exist, also of those that only running calls still hold."""
        return sum(list(self._held.values()))

    def excess(self, needed: int = 0) -> int:
        """Bytes over the limit if `needed` more were taken; 0 or less when they fit."""
        return self.total + needed - self.limit if self.limit else 0

    def expected(self, sha256: str, file_bytes: int) -> int:
        """What a session of this file will hold: what it held before, or else its size."""
        return max(file_bytes, self._seen.get(sha256, 0))

    def count(self, session: object, sha256: str, file_bytes: int, growth: int) -> int:
        """Takes a new session into the ledger until Python frees it; returns its bytes."""
        size = max(growth, self.expected(sha256, file_bytes))
        self._seen.pop(sha256, None)
        self._seen[sha256] = size
        while len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]
        key = id(session)
        self._held[key] = size
        weakref.finalize(session, self._held.pop, key, None)
        return size


def settle_before_measuring() -> int:
    """`private_bytes` after the free memory was returned, so that growth from here on is real."""
    gc.collect(1)
    return_free_memory()
    return private_bytes()
