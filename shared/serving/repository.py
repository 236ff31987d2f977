"""The model repository of one serving process: what lies in the model roots, what of it is in memory, and for whom.

Roots are searched in order; the first that holds a version wins. A new newest version becomes visible when it is warm,
so a request for 'the newest' never waits for a rolling update, and what it replaces goes only after that. Whoever uses
a variant holds a lease; a retired one is closed after the last. A broken version is remembered with its reason and
answers FAILED_PRECONDITION, while everything else serves. What came from a folder that cannot be read any more serves
on from memory and says so.

All state belongs to the event loop; only scanning, checking and opening run in threads, one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.artifacts import ArtifactError
from shared.errors import ModelNotFound, ModelUnavailable, UsagiError, code_of
from shared.serving.batching import Batcher, ComputePool
from shared.serving.memory import SessionMemory
from shared.serving.model_table import UNLOADED, ModelTable
from shared.serving.model_updates import ModelUpdates
from shared.serving.residency import Residency
from shared.serving.session import OnnxSession, Session
from shared.serving.settling import SETTLE_SECONDS, Settling
from shared.serving.shadowing import ShadowGate
from shared.serving.telemetry import Telemetry
from shared.serving.traffic import UNROUTED, ShadowDropped, Traffic, traffic
from shared.serving.versions import ModelVersion, Opener, ServedVariant, State
from shared.signatures import TrustedKey

__all__ = ["AUTO", "ModelRepository", "ModelVersion", "RepositoryOptions", "ServedVariant", "State"]

log = logging.getLogger(__name__)

AUTO = "auto"


@dataclass(frozen=True)
class RepositoryOptions:
    """`queue_size`: see BatchLimits; `open_session`: makes a session from the path of a verified graph.

    `memory_limit`: bytes that the sessions together may hold (see memory.py), 0 for no limit. `settle_seconds`: see
    settling.py. `trusted_keys`: with any, only versions that one of them signed are served.
    """

    queue_size: int = 100
    open_session: Callable[[Path | bytes], Session] = OnnxSession
    memory_limit: int = 0
    settle_seconds: float = SETTLE_SECONDS
    trusted_keys: tuple[TrustedKey, ...] = ()


class ModelRepository:
    """All versions of all models of one service.

    Args:
        service: the domain; the folder below each root.
        roots: model roots, searched in order; those that do not exist are empty.
        pool: runs the graphs.
        telemetry: is told of batches.
        options: see RepositoryOptions.
    """

    def __init__(
        self,
        service: str,
        roots: Iterable[Path],
        pool: ComputePool,
        telemetry: Telemetry,
        options: RepositoryOptions | None = None,
    ) -> None:
        options = options or RepositoryOptions()
        self.service = service
        self.roots = tuple(roots)
        self.memory = SessionMemory(options.memory_limit)
        self._telemetry = telemetry
        self._table = ModelTable()
        opener = Opener(pool, telemetry, self.memory, options.open_session, options.queue_size)
        self._residency = Residency(self._table, opener, self.memory, telemetry)
        settling = Settling(options.settle_seconds)
        self._updates = ModelUpdates(
            service, self.roots, self._table, self._residency, telemetry, settling, options.trusted_keys
        )
        self._shadow_gate = ShadowGate(pool)
        self._changing = asyncio.Lock()
        telemetry.memory(lambda: self.memory.total, options.memory_limit)

    # What there is

    def versions(self) -> list[ModelVersion]:
        """All versions, by name and number."""
        return self._table.versions()

    def find(self, name: str, version: str = "") -> ModelVersion:
        """The version that a request means; see ModelTable."""
        return self._table.find(name, version)

    def overload(self) -> Batcher | None:
        """A batcher if every one in memory is full; see Residency."""
        return self._residency.overload()

    # Requests

    @asynccontextmanager
    async def acquire(self, name: str, version: str = "", variant: str = "") -> AsyncIterator[ServedVariant]:
        """Leases a variant for one request, loading it first if need be.

        Args:
            name: model name.
            version: empty for the one that the gateway's canary chose, or else the newest.
            variant: empty or `auto` for the fastest within its budget.

        Raises:
            ModelNotFound: no such model, version or variant.
            ModelUnavailable: broken or unloaded.
            ModelMemoryFull: it is not in memory, and everything that is is in use.
            ShadowDropped: this is the copy of a call, and not to be run.
        """
        call = traffic.get()
        if call is UNROUTED:
            served = await self._variant(name, version, variant)
        else:
            served = await self._routed(call, name, version, variant)
        self.lease(served)  # before anything waits again, so that it cannot be closed meanwhile
        try:
            if call is UNROUTED:
                with served.observer.request():
                    yield served
            else:
                async with self._observed(call, served):
                    with contextlib.nullcontext() if call.shadow else served.observer.request():
                        yield served
        finally:
            self.release(served)

    def ready(self, name: str, version: str, variant: str) -> ServedVariant | None:
        """What `acquire` would lease to a call that no canary routed; None unless it is in memory, ready to run."""
        try:
            entry = self.find(name, version)
            return entry.loaded.get(self._variant_name(entry, variant))
        except UsagiError:
            return None

    def lease(self, served: ServedVariant) -> None:
        """Holds a variant in memory until `release`; called before anything waits after it was found."""
        self._residency.lease(served)

    def release(self, served: ServedVariant) -> None:
        """Ends a lease."""
        self._residency.release(served)

    async def _routed(self, call: Traffic, name: str, version: str, variant: str) -> ServedVariant:
        """The first version of the canary's that can answer; else, for a live call, what it gets without a canary."""
        wanted = call.versions.get(name, ()) if version == "" else ()
        for number in wanted:
            try:
                return await self._variant(name, number, variant)
            except (ModelNotFound, ModelUnavailable) as error:
                log.debug("canary passed over", extra={"model": name, "version": number, "reason": error.message})
        if not call.shadow:
            return await self._variant(name, version, variant)
        if wanted:
            self._telemetry.shadow_dropped.labels(name, wanted[0], "unavailable").inc()
        raise ShadowDropped(f"the copy names no version of {name} that is here")

    @asynccontextmanager
    async def _observed(self, call: Traffic, served: ServedVariant) -> AsyncIterator[None]:
        """Measures a call that a canary routed; a copy waits for its turn first."""
        model, version, _ = served.observer.labels
        leave = None
        if call.shadow:
            try:
                leave = await self._shadow_gate.enter()
            except ShadowDropped:
                self._telemetry.shadow_dropped.labels(model, version, "busy").inc()
                raise
        started, code = time.perf_counter(), "OK"
        try:
            yield
        except BaseException as error:
            code = code_of(error)
            raise
        finally:
            if leave is not None:
                leave()
            seconds = time.perf_counter() - started
            self._telemetry.version_seconds.labels(model, version, call.kind, code).observe(seconds)

    async def _variant(self, name: str, version: str, variant: str) -> ServedVariant:
        while True:
            entry = self.find(name, version)
            key = self._variant_name(entry, variant)
            served = entry.loaded.get(key)
            if served is not None:
                return served
            await self._load_for_use(entry, key)  # meanwhile the world may have changed, so look again

    @staticmethod
    def _variant_name(entry: ModelVersion, variant: str) -> str:
        if entry.failure or entry.withdrawn or entry.manifest is None:
            raise ModelUnavailable(
                f"model {entry.name} version {entry.version} is {entry.state.value}: {entry.reason}",
                metadata={"model": entry.name, "version": str(entry.version)},
            )
        name = entry.auto if variant in ("", AUTO) else variant
        if name not in entry.manifest.variants:
            raise ModelNotFound("variant", name, [AUTO, *entry.manifest.variants])
        if name in entry.broken:
            metadata = {"model": entry.name, "version": str(entry.version), "variant": name}
            raise ModelUnavailable(entry.broken[name], metadata=metadata)
        return name

    async def _load_for_use(self, entry: ModelVersion, variant: str) -> None:
        try:
            await self._residency.open(entry, variant, in_use=True)
        except ArtifactError as error:
            if variant == entry.auto:
                self._residency.fail(entry, error.message)
            else:
                self._residency.mark_broken(entry, variant, error.message)

    # Changes

    async def rescan(self, *, patient: bool = False) -> None:
        """Brings the table up to date with the roots: loads what is new, retires what is gone.

        With `patient`, files without a manifest that may still be copied get the time to show that they are not.
        """
        async with self._changing:
            found = await self._updates.look(patient)
            for name in sorted({*found.models, *self._table.models}):
                await self._updates.update(name, found)
            self._table.complete = True

    async def load(self, name: str, version: str = "", variant: str = "") -> ModelVersion:
        """Loads a model now, also one that was unloaded, was broken or was published just now.

        An empty version takes every unloading of the model back and loads the newest; a number serves that version in
        this process whatever the policy says. Raises as `acquire` does.
        """
        async with self._changing:
            await self._updates.update(name, await self._updates.look(patiently=True, name=name))
            entry = self.find(name, version)
            model = self._table.models[name]
            if version:
                model.forced[entry.version] = True
            else:
                model.forced.clear()
                model.unloaded = False
            again = [
                other for other in model.versions if (other.failure or other.broken) and (not version or other is entry)
            ]
            for other in again:
                other.failure, other.checked, other.warmed = "", False, False
                other.broken.clear()
            await self._updates.settle(model, model.versions)
        await self._variant(name, version, variant)
        return self.find(name, version)

    def unload(self, name: str, version: str = "") -> list[ModelVersion]:
        """Stops serving one version, or all of a model with those still to come; running calls finish.

        Raises:
            ModelNotFound: no such model or version.
        """
        first = self.find(name, version)
        model = self._table.models[name]
        if version:
            model.forced[first.version] = False
        else:
            model.forced.clear()
            model.unloaded = True
        entries = [first] if version else list(model.versions)
        for entry in entries:
            if not entry.failure:
                self._residency.withdraw(entry, UNLOADED)
        return entries
