"""Which variants are in memory: brought there when they are wanted, closed when they are not, never under a request.

Whoever uses a variant holds a lease; one that was dropped meanwhile is closed after the last. Above the limit of
memory idle variants go, least recently used first.
"""

from __future__ import annotations

import asyncio
import logging
import time

from shared.errors import ModelMemoryFull, ModelUnavailable, UsagiError
from shared.serving.batching import Batcher
from shared.serving.memory import SessionMemory
from shared.serving.model_table import ModelTable
from shared.serving.telemetry import Telemetry
from shared.serving.versions import ModelVersion, Opener, ServedVariant

log = logging.getLogger(__name__)


class Residency:
    """The variants in memory of one process.

    Args:
        table: the models.
        opener: opens variants.
        memory: counts what they hold.
        telemetry: is told of them.
    """

    def __init__(self, table: ModelTable, opener: Opener, memory: SessionMemory, telemetry: Telemetry) -> None:
        self._table, self._opener, self.memory, self._telemetry = table, opener, memory, telemetry
        self._served: dict[ServedVariant, ModelVersion] = {}
        self._opening = asyncio.Lock()
        self._uses = 0

    def overload(self) -> Batcher | None:
        """A batcher if every one in memory is full, so that no call at all can be taken; else None, found at once."""
        some = None
        for served in self._served:
            if not served.batcher.full:
                return None
            some = served.batcher
        return some

    def lease(self, served: ServedVariant) -> None:
        """Holds a variant in memory until `release`; called before anything waits after it was found."""
        served.leases += 1

    def release(self, served: ServedVariant) -> None:
        """Ends a lease."""
        served.leases -= 1
        self._uses += 1
        served.used = self._uses
        if not served.leases and (served.retired or self.memory.limit):
            self._rest(served)

    def _rest(self, served: ServedVariant) -> None:
        """The last lease of a variant ended."""
        if served.retired:
            served.batcher.close()
        if self.memory.excess() > 0:
            self.make_room(0)

    async def open(self, entry: ModelVersion, variant: str, *, in_use: bool) -> None:
        """Brings a variant into memory, if it is not there and the version is still in service.

        Raises:
            ArtifactError: it cannot be opened.
            ModelMemoryFull: there is no room for it, and it is for a request.
        """
        async with self._opening:
            known = variant in entry.loaded or variant in entry.broken or entry.failure
            if known or entry.retired or entry.withdrawn or entry.manifest is None:
                return
            file = entry.manifest.variants[variant]
            needed = self.memory.expected(file.sha256, file.bytes)
            if not self.make_room(needed) and in_use:
                raise self._memory_full(entry, needed)
            started = time.perf_counter()
            served = await asyncio.to_thread(self._opener.open, entry, variant)
            served.load_seconds = time.perf_counter() - started
            if entry.retired or entry.withdrawn:
                served.batcher.close()
                return
            if entry.cache is not None:
                served.keep_answers(entry.cache, self._telemetry)
            entry.loaded[variant] = served
            self._served[served] = entry
            self._uses += 1
            served.used = self._uses
            self.announce(served)
            names = {"model": entry.name, "version": entry.version, "variant": variant}
            figures = {"seconds": round(served.load_seconds, 3), "bytes": served.memory}
            log.info("loaded", extra={**names, **figures, "providers": list(served.providers)})
            self.make_room(0, sparing=served)

    def announce(self, served: ServedVariant) -> None:
        """Tells the metrics of a variant in memory."""
        batcher, file = served.batcher, served.manifest.variants[served.variant]
        self._telemetry.loaded(
            served.observer.labels, seconds=served.load_seconds, size_bytes=file.bytes, depth=lambda: batcher.depth
        )

    def _memory_full(self, entry: ModelVersion, needed: int) -> UsagiError:
        limit = self.memory.limit
        name = f"model {entry.name} version {entry.version}"
        text = f"{name} needs about {needed} bytes, USAGI_MODEL_MEMORY_MB allows {limit} for all models"
        if needed > limit:
            return ModelUnavailable(f"{text}; raise it")
        return ModelMemoryFull(f"{text}, and the models in memory are in use; come back later", retry_after=1.0)

    def make_room(self, needed: int, sparing: ServedVariant | None = None) -> bool:
        """Closes idle variants, least recently used first, until `needed` more bytes fit; says whether they do.

        The `auto` variant of a model's newest version goes last. What could not be loaded again never goes.
        """
        while self.memory.excess(needed) > 0:
            idle = [
                (served.variant == entry.auto and self._table.find(entry.name) is entry, served.used, served, entry)
                for served, entry in self._served.items()
                if not served.leases
                and served is not sparing
                and not entry.warning
                and entry.name in self._table.models
            ]
            if not idle:
                return False
            _, _, served, entry = min(idle, key=lambda candidate: candidate[:2])
            self.drop(entry, served)
            self._telemetry.evicted.inc()
            names = {"model": entry.name, "version": entry.version, "variant": served.variant}
            log.info("evicted", extra={**names, "bytes": served.memory, "limit": self.memory.limit})
        return True

    def has_room(self, entry: ModelVersion) -> bool:
        """Whether the `auto` variant of a version would fit beside what is in memory."""
        if entry.manifest is None:
            return True
        file = entry.manifest.variants[entry.auto]
        return self.memory.excess(self.memory.expected(file.sha256, file.bytes)) <= 0

    def drop(self, entry: ModelVersion, served: ServedVariant) -> None:
        """Takes a variant out of service; it is closed now, or by its last lease."""
        del entry.loaded[served.variant]
        del self._served[served]
        self._telemetry.forget(*served.observer.labels)
        served.forget_answers()
        served.retired = True
        if not served.leases:
            served.batcher.close()

    def fail(self, entry: ModelVersion, reason: str) -> None:
        """A version cannot be served."""
        entry.failure = reason
        for served in list(entry.loaded.values()):
            self.drop(entry, served)
        self._telemetry.load_failures.inc()
        log.error("model failed", extra={"model": entry.name, "version": entry.version, "reason": reason})

    def mark_broken(self, entry: ModelVersion, variant: str, reason: str) -> None:
        """A variant cannot be served; the others of its version can."""
        entry.broken[variant] = reason
        self._telemetry.load_failures.inc()
        names = {"model": entry.name, "version": entry.version, "variant": variant}
        log.error("variant failed", extra={**names, "reason": reason})

    def withdraw(self, entry: ModelVersion, reason: str) -> None:
        """A version is not to be served, though it could."""
        if entry.loaded or entry.withdrawn != reason:
            log.info("model withdrawn", extra={"model": entry.name, "version": entry.version, "reason": reason})
        entry.withdrawn = reason
        for served in list(entry.loaded.values()):
            self.drop(entry, served)

    def retire(self, entry: ModelVersion) -> None:
        """A version is not there any more."""
        entry.retired = True
        for served in list(entry.loaded.values()):
            self.drop(entry, served)
        if entry.found.settled:
            log.info("model retired", extra={"model": entry.name, "version": entry.version})
