"""The model repository of one serving process: what lies in the model roots, what of it is in memory, and for whom.

Roots are searched in order; the first that holds a version wins. A version becomes visible when its `auto` variant is
loaded and warm, so a request for 'the newest' never waits for a rolling update. Whoever uses a variant holds a lease; a
retired version keeps its leases alive and is freed after the last. A broken version is remembered with its reason and
answers FAILED_PRECONDITION, while everything else serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from shared.artifacts import CARD_NAME, MANIFEST_NAME, ArtifactError, Manifest, read_manifest, verify_variant
from shared.errors import ModelNotFound, ModelUnavailable, Unreachable, UsagiError, code_of
from shared.serving.batching import Batcher, BatchLimits, ComputePool
from shared.serving.model_observer import ModelObserver
from shared.serving.session import OnnxSession, Session, zeros_for
from shared.serving.shadowing import ShadowGate
from shared.serving.telemetry import Telemetry
from shared.serving.traffic import UNROUTED, ShadowDropped, Traffic, traffic

log = logging.getLogger(__name__)

AUTO = "auto"


class State(Enum):
    """Whether a version can answer."""

    READY = "ready"
    AVAILABLE = "available"
    UNLOADED = "unloaded"
    FAILED = "failed"


@dataclass(frozen=True)
class RepositoryOptions:
    """`queue_size`: see BatchLimits; `open_session`: makes a session from the path of a verified graph."""

    queue_size: int = 100
    open_session: Callable[[Path], Session] = OnnxSession


@dataclass(eq=False)
class ServedVariant:
    """A variant in memory: its manifest, its batcher, its observer."""

    manifest: Manifest
    variant: str
    batcher: Batcher
    observer: ModelObserver
    leases: int = 0

    @property
    def version(self) -> str:
        """The version as the API shows it."""
        return str(self.manifest.version)


@dataclass(eq=False)
class ModelVersion:
    """A version on disk. `signature` changes when it was published again; `auto` is the variant that `auto` means."""

    name: str
    version: int
    folder: Path
    signature: tuple[int, int]
    manifest: Manifest | None = None
    state: State = State.AVAILABLE
    reason: str = ""
    auto: str = ""
    loaded: dict[str, ServedVariant] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def card(self) -> str:
        """The model card, or nothing."""
        try:
            return (self.folder / CARD_NAME).read_text(encoding="utf-8")
        except OSError:
            return ""


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
        self.service = service
        self.roots = tuple(roots)
        self._pool = pool
        self._telemetry = telemetry
        self._options = options or RepositoryOptions()
        self._versions: dict[tuple[str, int], ModelVersion] = {}
        self._by_name: dict[str, list[ModelVersion]] = {}
        self._shadow_gate = ShadowGate(pool)
        self._rescan_lock = asyncio.Lock()
        self._scanned = False

    def versions(self) -> list[ModelVersion]:
        """All versions, by name and number."""
        return [entry for name in sorted(self._by_name) for entry in self._by_name[name]]

    def overload(self) -> Batcher | None:
        """A batcher if every one in memory is full, so that no call at all can be taken; else None, found at once."""
        some = None
        for entry in self._versions.values():
            for served in entry.loaded.values():
                if not served.batcher.full:
                    return None
                some = served.batcher
        return some

    def _index(self) -> None:
        by_name: dict[str, list[ModelVersion]] = {}
        for key in sorted(self._versions):
            by_name.setdefault(key[0], []).append(self._versions[key])
        self._by_name = by_name

    async def rescan(self) -> None:
        """Brings the table up to date with the roots: loads what is new, retires what is gone."""
        async with self._rescan_lock:
            found = await asyncio.to_thread(self._scan)
            for key in [key for key in self._versions if key not in found]:
                gone = self._versions.pop(key)
                self._index()
                self._retire(gone, "its folder is gone")
            for key, candidate in found.items():
                known = self._versions.get(key)
                if known is None or known.signature != candidate.signature or known.folder != candidate.folder:
                    await self._load_new(candidate)
                    self._versions[key] = candidate
                    self._index()
                    if known is not None:
                        self._retire(known, "it was published again")
            self._scanned = True

    def _scan(self) -> dict[tuple[str, int], ModelVersion]:
        found: dict[tuple[str, int], ModelVersion] = {}
        for root in self.roots:
            for manifest_path in sorted((root / self.service).glob(f"[!.]*/[0-9]*/{MANIFEST_NAME}")):
                folder = manifest_path.parent
                if not folder.name.isdigit():
                    continue
                with contextlib.suppress(OSError):  # it may vanish while we look
                    stat = manifest_path.stat()
                    key = (folder.parent.name, int(folder.name))
                    if key not in found:
                        found[key] = ModelVersion(key[0], key[1], folder, (stat.st_mtime_ns, stat.st_ino))
        return found

    async def _load_new(self, version: ModelVersion) -> None:
        try:
            version.manifest = await asyncio.to_thread(read_manifest, version.folder)
            if version.manifest.service != self.service:
                raise ArtifactError(f"{version.folder} belongs to the service {version.manifest.service}")
            version.auto = version.manifest.auto_variant()
            await self._load(version, version.auto)
        except UsagiError as error:
            self._fail(version, error.message)

    def _fail(self, version: ModelVersion, reason: str) -> None:
        version.state, version.reason = State.FAILED, reason
        self._telemetry.load_failures.inc()
        log.error("model failed", extra={"model": version.name, "version": version.version, "reason": reason})

    def _retire(self, version: ModelVersion, reason: str) -> None:
        """Takes a version out of service; sessions go when their last lease ends and Python drops them."""
        for served in version.loaded.values():
            self._telemetry.forget(*served.observer.labels)
        version.loaded.clear()
        log.info("model retired", extra={"model": version.name, "version": version.version, "reason": reason})

    async def _load(self, version: ModelVersion, variant: str) -> ServedVariant:
        async with version.lock:
            if variant in version.loaded:
                return version.loaded[variant]
            started = time.perf_counter()
            served = await asyncio.to_thread(self._open, version, variant)
            version.loaded[variant] = served
            version.state, version.reason = State.READY, ""
            seconds, size = time.perf_counter() - started, served.manifest.variants[variant].bytes
            batcher = served.batcher
            self._telemetry.loaded(
                served.observer.labels, seconds=seconds, size_bytes=size, depth=lambda: batcher.depth
            )
            names = {"model": version.name, "version": version.version, "variant": variant}
            log.info("loaded", extra={**names, "seconds": round(seconds, 3)})
            return served

    def _open(self, version: ModelVersion, name: str) -> ServedVariant:
        """Verifies, opens and warms a variant; runs in a thread.

        Raises:
            ArtifactError: the file is not what the manifest says, or not a graph that runs.
        """
        manifest = version.manifest
        if manifest is None:
            raise ArtifactError(version.reason)
        variant = manifest.variants[name]
        path = verify_variant(version.folder, variant)
        shapes = {spec.name: (spec.dtype, spec.shape) for spec in manifest.inputs}
        try:
            session = self._options.open_session(path)
            for batch in (1, variant.max_batch):
                session.run(zeros_for(shapes, batch))
        except Exception as error:  # ONNX Runtime raises a class of its own for every kind of fault
            raise ArtifactError(f"{path} does not run: {error}") from error
        observer = self._telemetry.observer(version.name, str(version.version), name)
        max_batch = variant.max_batch if manifest.batchable else 1
        limits = BatchLimits(max_batch=max_batch, queue_size=self._options.queue_size)
        batcher = Batcher(session, self._pool, limits, observer)
        return ServedVariant(manifest, name, batcher, observer)

    def find(self, name: str, version: str = "") -> ModelVersion:
        """The version that a request means; an empty version is the newest that is not broken.

        Raises:
            ModelNotFound: no such model or version; `field` is `model` or `version`.
            Unreachable: the process starts and does not know its models yet.
        """
        candidates = self._by_name.get(name)
        if not candidates and not self._scanned:  # the port is open before the models are warm
            raise Unreachable("the models are still loading; come back in a moment")
        if not candidates:
            raise ModelNotFound("model", name, sorted(self._by_name))
        if version == "":
            for entry in reversed(candidates):
                if entry.state in (State.READY, State.AVAILABLE):
                    return entry
            return candidates[-1]
        for entry in candidates:
            if str(entry.version) == version:
                return entry
        raise ModelNotFound("version", version, [str(entry.version) for entry in candidates])

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
            ShadowDropped: this is the copy of a call, and not to be run.
        """
        call = traffic.get()
        if call is UNROUTED:
            served = await self.variant(self.find(name, version), variant)
        else:
            served = await self._routed(call, name, version, variant)
        async with contextlib.AsyncExitStack() as routed:
            if call is not UNROUTED:
                await routed.enter_async_context(self._observed(call, served))
            served.leases += 1
            started = time.perf_counter()
            counted = contextlib.nullcontext() if call.shadow else served.observer.statistics.request()
            try:
                with counted:
                    yield served
                if not call.shadow:
                    served.observer.whole.observe(time.perf_counter() - started)
            finally:
                served.leases -= 1

    async def _routed(self, call: Traffic, name: str, version: str, variant: str) -> ServedVariant:
        """The first version of the canary's that can answer; else, for a live call, what it gets without a canary."""
        wanted = call.versions.get(name, ()) if version == "" else ()
        for number in wanted:
            try:
                return await self.variant(self.find(name, number), variant)
            except (ModelNotFound, ModelUnavailable) as error:
                log.debug("canary passed over", extra={"model": name, "version": number, "reason": error.message})
        if not call.shadow:
            return await self.variant(self.find(name, version), variant)
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

    async def variant(self, version: ModelVersion, variant: str = "") -> ServedVariant:
        """The variant of a version, loaded; raises as `acquire` does."""
        metadata = {"model": version.name, "version": str(version.version)}
        if version.state in (State.FAILED, State.UNLOADED) or version.manifest is None:
            raise ModelUnavailable(
                f"model {version.name} version {version.version} is {version.state.value}: {version.reason}",
                metadata=metadata,
            )
        name = version.auto if variant in ("", AUTO) else variant
        if name not in version.manifest.variants:
            raise ModelNotFound("variant", name, [AUTO, *version.manifest.variants])
        if name in version.loaded:
            return version.loaded[name]
        try:
            return await self._load(version, name)
        except ArtifactError as error:
            self._telemetry.load_failures.inc()
            log.error("variant failed", extra={**metadata, "variant": name, "reason": error.message})
            raise ModelUnavailable(error.message, metadata={**metadata, "variant": name}) from error

    async def load(self, name: str, version: str = "", variant: str = "") -> ModelVersion:
        """Loads a model now, also one that was unloaded or was broken; raises as `acquire` does."""
        entry = self.find(name, version)
        if entry.state is State.FAILED:
            await self._load_again(entry)
        elif entry.state is State.UNLOADED:
            entry.state, entry.reason = State.AVAILABLE, ""
        await self.variant(entry, variant)
        return entry

    async def _load_again(self, entry: ModelVersion) -> None:
        entry.state, entry.reason = State.AVAILABLE, ""
        await self._load_new(entry)

    def unload(self, name: str, version: str = "") -> list[ModelVersion]:
        """Stops serving one version, or all of a model; running calls finish.

        Raises:
            ModelNotFound: no such model or version.
        """
        first = self.find(name, version)
        entries = [first] if version else list(self._by_name[name])
        for entry in entries:
            self._retire(entry, "unloaded on request")
            entry.state, entry.reason = State.UNLOADED, "unloaded on request; load it to serve it again"
        return entries
