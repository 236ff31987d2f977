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
from dataclasses import dataclass, field
from pathlib import Path

from shared.artifacts import ArtifactError
from shared.errors import ModelMemoryFull, ModelNotFound, ModelUnavailable, Unreachable, UsagiError, code_of
from shared.serving.batching import Batcher, ComputePool
from shared.serving.memory import SessionMemory
from shared.serving.model_config import CONFIG_NAME, ModelConfig, read_config
from shared.serving.model_folders import FoundModel, FoundVersion, Scan, Stamp, scan
from shared.serving.response_cache import ResponseCache
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
COPYING = "its file changed just now and may still be copied; it is served once it looks the same in two scans"
UNLOADED = "unloaded on request; load it to serve it again"


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


@dataclass(eq=False)
class _Model:
    """All versions of a model, oldest first; `forced` holds what LoadModel (True) and UnloadModel (False) ask for."""

    name: str
    versions: list[ModelVersion] = field(default_factory=list)
    config: ModelConfig = field(default_factory=ModelConfig)
    config_stamp: Stamp | None = None
    config_problem: str = ""
    cache: ResponseCache | None = None
    unloaded: bool = False
    forced: dict[int, bool] = field(default_factory=dict)

    def refusal(self, version: ModelVersion, among: Iterable[ModelVersion]) -> str:
        """Why a version is not to be served, given what else there is; empty if it is."""
        forced = self.forced.get(version.version)
        if forced is not None or self.unloaded:
            return "" if forced else UNLOADED
        policy = self.config.versions
        if version.version in policy.select([other.version for other in among if not other.failure]):
            return ""
        return f"not chosen by the version policy `{policy}` of {CONFIG_NAME}; LoadModel serves it nonetheless"


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
        self._opener = Opener(pool, telemetry, self.memory, options.open_session, options.queue_size)
        self._models: dict[str, _Model] = {}
        self._served: dict[ServedVariant, ModelVersion] = {}
        self._shadow_gate = ShadowGate(pool)
        self._trusted = options.trusted_keys
        self._settling = Settling(options.settle_seconds)
        self._changing, self._opening = asyncio.Lock(), asyncio.Lock()
        self._uses = 0
        self._scanned = False
        telemetry.memory(lambda: self.memory.total, options.memory_limit)

    # What there is

    def versions(self) -> list[ModelVersion]:
        """All versions, by name and number."""
        return [entry for name in sorted(self._models) for entry in self._models[name].versions]

    def overload(self) -> Batcher | None:
        """A batcher if every one in memory is full, so that no call at all can be taken; else None, found at once."""
        some = None
        for served in self._served:
            if not served.batcher.full:
                return None
            some = served.batcher
        return some

    def find(self, name: str, version: str = "") -> ModelVersion:
        """The version that a request means; an empty version is the newest that is not broken.

        Raises:
            ModelNotFound: no such model or version; `field` is `model` or `version`.
            Unreachable: the process starts and does not know its models yet.
        """
        model = self._models.get(name)
        if model is None and not self._scanned:  # the port is open before the models are warm
            raise Unreachable("the models are still loading; come back in a moment")
        if model is None:
            raise ModelNotFound("model", name, sorted(self._models))
        if version == "":
            for entry in reversed(model.versions):
                if entry.state in (State.READY, State.AVAILABLE):
                    return entry
            return model.versions[-1]
        for entry in model.versions:
            if str(entry.version) == version:
                return entry
        raise ModelNotFound("version", version, [str(entry.version) for entry in model.versions])

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
        served.leases += 1

    def release(self, served: ServedVariant) -> None:
        """Ends a lease."""
        served.leases -= 1
        self._uses += 1
        served.used = self._uses
        if not served.leases and (served.retired or self.memory.limit):
            self._rest(served)

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

    def _rest(self, served: ServedVariant) -> None:
        """The last lease of a variant ended."""
        if served.retired:
            served.batcher.close()
        if self.memory.excess() > 0:
            self._make_room(0)

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
            await self._open(entry, variant, in_use=True)
        except ArtifactError as error:
            if variant == entry.auto:
                self._fail(entry, error.message)
            else:
                self._break(entry, variant, error.message)

    # Loading

    async def _open(self, entry: ModelVersion, variant: str, *, in_use: bool) -> None:
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
            if not self._make_room(needed) and in_use:
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
            self._announce(served)
            names = {"model": entry.name, "version": entry.version, "variant": variant}
            figures = {"seconds": round(served.load_seconds, 3), "bytes": served.memory}
            log.info("loaded", extra={**names, **figures, "providers": list(served.providers)})
            self._make_room(0, sparing=served)

    def _announce(self, served: ServedVariant) -> None:
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

    def _make_room(self, needed: int, sparing: ServedVariant | None = None) -> bool:
        """Closes idle variants, least recently used first, until `needed` more bytes fit; says whether they do.

        The `auto` variant of a model's newest version goes last. What could not be loaded again never goes.
        """
        while self.memory.excess(needed) > 0:
            idle = [
                (served.variant == entry.auto and self.find(entry.name) is entry, served.used, served, entry)
                for served, entry in self._served.items()
                if not served.leases and served is not sparing and not entry.warning and entry.name in self._models
            ]
            if not idle:
                return False
            _, _, served, entry = min(idle, key=lambda candidate: candidate[:2])
            self._drop(entry, served)
            self._telemetry.evicted.inc()
            names = {"model": entry.name, "version": entry.version, "variant": served.variant}
            log.info("evicted", extra={**names, "bytes": served.memory, "limit": self.memory.limit})
        return True

    def _drop(self, entry: ModelVersion, served: ServedVariant) -> None:
        """Takes a variant out of service; it is closed now, or by its last lease."""
        del entry.loaded[served.variant]
        del self._served[served]
        self._telemetry.forget(*served.observer.labels)
        served.forget_answers()
        served.retired = True
        if not served.leases:
            served.batcher.close()

    def _fail(self, entry: ModelVersion, reason: str) -> None:
        entry.failure = reason
        for served in list(entry.loaded.values()):
            self._drop(entry, served)
        self._telemetry.load_failures.inc()
        log.error("model failed", extra={"model": entry.name, "version": entry.version, "reason": reason})

    def _break(self, entry: ModelVersion, variant: str, reason: str) -> None:
        entry.broken[variant] = reason
        self._telemetry.load_failures.inc()
        names = {"model": entry.name, "version": entry.version, "variant": variant}
        log.error("variant failed", extra={**names, "reason": reason})

    def _withdraw(self, entry: ModelVersion, reason: str) -> None:
        if entry.loaded or entry.withdrawn != reason:
            log.info("model withdrawn", extra={"model": entry.name, "version": entry.version, "reason": reason})
        entry.withdrawn = reason
        for served in list(entry.loaded.values()):
            self._drop(entry, served)

    # Changes

    async def rescan(self, *, patient: bool = False) -> None:
        """Brings the table up to date with the roots: loads what is new, retires what is gone.

        With `patient`, files without a manifest that may still be copied get the time to show that they are not.
        """
        async with self._changing:
            found, unsettled = await self._look()
            if unsettled and patient:
                found, _ = await self._look(after=self._settling.seconds)
            for name in sorted({*found.models, *self._models}):
                await self._update(name, found)
            self._scanned = True

    async def _look(self, after: float = 0.0) -> tuple[Scan, set[str]]:
        """What lies in the roots in `after` seconds, and which models may still be copied."""
        if after:
            await asyncio.sleep(after)
        found = await asyncio.to_thread(scan, self.roots, self.service)
        return found, self._settling.judge(found)

    async def _update(self, name: str, found: Scan) -> None:
        model = self._models.get(name) or _Model(name)
        there = found.models.get(name, FoundModel())
        await self._update_config(model, there)
        known = {entry.version: entry for entry in model.versions}
        following: dict[int, ModelVersion] = {}
        for number, version in there.versions.items():
            entry = known.get(number)
            if entry is not None and self._is_same(entry, version):
                following[number] = entry
                self._warn(entry, "")
            else:
                following[number] = ModelVersion(name, number, version)
        for number, entry in known.items():
            cause = found.cause_for(entry.folder)
            if cause and not entry.failure and (number not in there.versions or following[number] is not entry):
                following[number] = entry
                self._warn(entry, f"{cause}; serving from memory")
            elif entry.loaded and following.get(number) is not entry:
                self._keep_replaced(entry, following)
        await self._settle(model, [following[number] for number in sorted(following)])

    @staticmethod
    def _is_same(entry: ModelVersion, version: FoundVersion) -> bool:
        before = entry.found
        if (before.folder, before.published, before.settled) != (version.folder, version.published, version.settled):
            return False
        return not (entry.failure and before.files != version.files)

    def _keep_replaced(self, entry: ModelVersion, following: dict[int, ModelVersion]) -> None:
        """Keeps a version without a manifest while what lies in its place now cannot be served."""
        graph = entry.found.graph
        for number, other in list(following.items()):
            if graph is None or other.found.graph != graph:
                continue
            if number != entry.version:
                entry.successor = other
                following[entry.version] = entry
            elif not other.found.settled:
                following[number] = entry
                self._warn(entry, f"{graph.name} is being replaced; serving from memory")
            return

    async def _update_config(self, model: _Model, there: FoundModel) -> None:
        if there.config_stamp == model.config_stamp:
            return
        model.config_stamp, model.config_problem = there.config_stamp, ""
        try:
            model.config = await asyncio.to_thread(read_config, there.config) if there.config else ModelConfig()
        except ArtifactError as error:  # what was said before holds
            model.config_problem = error.message
            log.error("model.toml ignored", extra={"model": model.name, "reason": error.message})
        limit = model.config.cache_bytes
        if limit != (model.cache.limit if model.cache else 0):
            model.cache = ResponseCache(limit) if limit else None
            for entry in model.versions:
                for served in entry.loaded.values():
                    served.keep_answers(model.cache, self._telemetry)
                    self._announce(served)  # its queue is another one now

    @staticmethod
    def _warn(entry: ModelVersion, warning: str) -> None:
        if entry.warning != warning:
            entry.warning = warning
            if warning:
                log.warning("model warning", extra={"model": entry.name, "version": entry.version, "reason": warning})

    async def _settle(self, model: _Model, following: list[ModelVersion]) -> None:
        """Makes `following` the versions of `model`: checks and warms what is new first, then swaps in one step."""
        for entry in following:
            entry.cache = model.cache
            if not entry.checked:
                await self._check(entry)
        while newest := self._newest(model, following):  # each turn loads it, or finds it broken
            if newest.warmed:  # once: what was evicted since comes back when it is used
                break
            newest.warmed = True
            if not model.versions and not self._has_room(newest):
                log.warning("not loaded at start", extra={"model": model.name, "version": newest.version})
                break
            try:
                newest.withdrawn = ""
                await self._open(newest, newest.auto, in_use=False)
                break
            except ArtifactError as error:
                self._fail(newest, error.message)
        for entry in following:
            if entry.successor is not None and entry.successor.failure:
                self._warn(entry, f"serving from memory, since its file was replaced: {entry.successor.failure}")
        following = [entry for entry in following if not entry.superseded]
        kept = set(following)
        for entry in model.versions:
            if entry not in kept:
                self._retire(entry)
        model.versions = following
        for entry in following:
            reason = "" if entry.failure else model.refusal(entry, following)
            if reason:
                self._withdraw(entry, reason)
            else:
                entry.withdrawn = ""
            if model.config_problem and not entry.warning:
                entry.notice = model.config_problem
            elif not model.config_problem:
                entry.notice = ""
            for served in entry.loaded.values():
                self._announce(served)  # again: a version that it replaces has taken its gauges along
        if following:
            self._models[model.name] = model
        else:
            self._models.pop(model.name, None)

    def _has_room(self, entry: ModelVersion) -> bool:
        if entry.manifest is None:
            return True
        file = entry.manifest.variants[entry.auto]
        return self.memory.excess(self.memory.expected(file.sha256, file.bytes)) <= 0

    @staticmethod
    def _newest(model: _Model, following: list[ModelVersion]) -> ModelVersion | None:
        serving = (entry for entry in reversed(following) if not entry.failure and not entry.superseded)
        return next((entry for entry in serving if not model.refusal(entry, following)), None)

    async def _check(self, entry: ModelVersion) -> None:
        entry.checked = True
        if not entry.found.settled:
            entry.failure = COPYING
            return
        try:
            await asyncio.to_thread(entry.check, self.service, self._trusted)
            if entry.plain is not None:
                names = {"model": entry.name, "version": entry.version}
                log.warning("model without a manifest", extra={**names, "reason": entry.plain.notice})
        except UsagiError as error:
            self._fail(entry, error.message)
        for variant, reason in entry.broken.items():
            names = {"model": entry.name, "version": entry.version, "variant": variant}
            log.error("variant failed", extra={**names, "reason": reason})

    def _retire(self, entry: ModelVersion) -> None:
        entry.retired = True
        for served in list(entry.loaded.values()):
            self._drop(entry, served)
        if entry.found.settled:
            log.info("model retired", extra={"model": entry.name, "version": entry.version})

    async def load(self, name: str, version: str = "", variant: str = "") -> ModelVersion:
        """Loads a model now, also one that was unloaded, was broken or was published just now.

        An empty version takes every unloading of the model back and loads the newest; a number serves that version in
        this process whatever the policy says. Raises as `acquire` does.
        """
        async with self._changing:
            found, unsettled = await self._look()
            if name in unsettled:
                found, _ = await self._look(after=self._settling.seconds)
            await self._update(name, found)
            entry = self.find(name, version)
            model = self._models[name]
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
            await self._settle(model, model.versions)
        await self._variant(name, version, variant)
        return self.find(name, version)

    def unload(self, name: str, version: str = "") -> list[ModelVersion]:
        """Stops serving one version, or all of a model with those still to come; running calls finish.

        Raises:
            ModelNotFound: no such model or version.
        """
        first = self.find(name, version)
        model = self._models[name]
        if version:
            model.forced[first.version] = False
        else:
            model.forced.clear()
            model.unloaded = True
        entries = [first] if version else list(model.versions)
        for entry in entries:
            if not entry.failure:
                self._withdraw(entry, UNLOADED)
        return entries
