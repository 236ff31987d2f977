"""Which files without a manifest are whole: those that look the same in two scans.

A manifest is put in place last, so what has one is whole. A plain file grows while it is copied, and nothing says that
it ended. One that nobody changed for a minute counts as whole at first sight.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from shared.serving.model_folders import Scan, Stamp

SETTLE_SECONDS = 1.0
"""From the first scan to the one that finds the same sizes and times."""
OLD_SECONDS = 60.0


class Settling:
    """Remembers how files looked.

    Args:
        seconds: see SETTLE_SECONDS.
        clock: seconds that never go back.
        now: seconds since 1970.
    """

    def __init__(
        self,
        seconds: float = SETTLE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.seconds = seconds
        self._clock, self._now = clock, now
        self._seen: dict[Path, tuple[Stamp, float]] = {}

    def judge(self, found: Scan) -> set[str]:
        """Marks in `found` the versions that are not settled; returns the names of their models."""
        seen, waiting = self._seen, set[str]()
        self._seen = {}
        for name, model in found.models.items():
            for number, version in model.versions.items():
                if version.graph is None:
                    continue
                stamp, since = seen.get(version.graph, ((), 0.0))
                if stamp != version.files:
                    since = self._first_sight(version.files)
                self._seen[version.graph] = version.files, since
                if self._clock() - since < self.seconds:
                    model.versions[number] = dataclasses.replace(version, settled=False)
                    waiting.add(name)
        return waiting

    def _first_sight(self, files: Stamp) -> float:
        changed = max(entry[1] for entry in files) / 1e9
        old = self._now() - changed > OLD_SECONDS
        return float("-inf") if old else self._clock()
