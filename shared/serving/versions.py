"""A model version as a serving process knows it, and its variants in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from shared.artifacts import (
    CARD_NAME,
    MANIFEST_NAME,
    ArtifactError,
    Manifest,
    Variant,
    check_size,
    read_assets,
    read_manifest,
    read_verified,
    verify_variant,
)
from shared.serving.batching import Batcher, BatchLimits, ComputePool
from shared.serving.cached_batching import CachedBatcher
from shared.serving.memory import SessionMemory, private_bytes, settle_before_measuring
from shared.serving.model_folders import FoundVersion
from shared.serving.model_observer import ModelObserver
from shared.serving.onnx_files import read_onnx_file
from shared.serving.plain_models import VARIANT, PlainModel, describe_plain
from shared.serving.response_cache import ResponseCache
from shared.serving.session import Arrays, OnnxSession, Session, zeros_for
from shared.serving.telemetry import Telemetry
from shared.signatures import TrustedKey, check_signed


class State(Enum):
    """Whether a version can answer."""

    READY = "ready"
    AVAILABLE = "available"
    UNLOADED = "unloaded"
    FAILED = "failed"


@dataclass(eq=False)
class ServedVariant:
    """A variant in memory: its manifest, its batcher, its observer, and the contents of its version's assets.

    `providers` are its session's. `leases` counts the requests that use it, `used` is the repository's tick of the last
    one's end, `memory` its bytes by the ledger of memory.py. Once `retired`, it is closed after the last lease.
    """

    manifest: Manifest
    variant: str
    batcher: Batcher
    observer: ModelObserver
    providers: tuple[str, ...] = ()
    assets: Mapping[str, bytes] = field(default_factory=dict)
    memory: int = 0
    load_seconds: float = 0.0
    leases: int = 0
    used: int = 0
    retired: bool = False

    @property
    def version(self) -> str:
        """The version as the API shows it."""
        return str(self.manifest.version)

    def keep_answers(self, cache: ResponseCache | None, telemetry: Telemetry) -> None:
        """From now on answers are kept in `cache`, or not at all; who waits already is answered as before."""
        self.forget_answers()
        telemetry.uncache(self.observer.labels)
        if cache is not None:
            section = cache.section(self.observer.forgotten)
            self.batcher = self.batcher.renewed(CachedBatcher).keep_in(section)
            telemetry.caching(self.observer.labels, lambda: section.bytes)
        elif isinstance(self.batcher, CachedBatcher):
            self.batcher = self.batcher.renewed(Batcher)

    def forget_answers(self) -> None:
        """Drops the answers that were kept, and those of runs that still go on."""
        if isinstance(self.batcher, CachedBatcher):
            self.batcher.section.drop()


@dataclass(eq=False)
class ModelVersion:
    """A version on disk, and what this process holds of it.

    `auto` is the variant that `auto` means. `failure`, `withdrawn` and `warning` say in words why the version is
    broken, is not served, or serves although its folder cannot be read; `notice` tells of a `model.toml` that is wrong.
    `broken` holds the reason of each variant that cannot be loaded. `checked`, `warmed`: whether that was tried.
    `plain` is set for a file without a manifest, `successor` once another one lies in its place. `cache` keeps its
    answers, if any. `signer` names the trusted key that signed it, where keys are.
    """

    name: str
    version: int
    found: FoundVersion
    manifest: Manifest | None = None
    auto: str = ""
    failure: str = ""
    withdrawn: str = ""
    warning: str = ""
    notice: str = ""
    checked: bool = False
    warmed: bool = False
    retired: bool = False
    broken: dict[str, str] = field(default_factory=dict)
    loaded: dict[str, ServedVariant] = field(default_factory=dict)
    plain: PlainModel | None = None
    successor: ModelVersion | None = None
    cache: ResponseCache | None = None
    signer: str = ""

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.found.folder

    @property
    def state(self) -> State:
        """Whether it can answer."""
        if self.failure:
            return State.FAILED
        if self.withdrawn:
            return State.UNLOADED
        return State.READY if self.loaded else State.AVAILABLE

    @property
    def reason(self) -> str:
        """Why it cannot answer, or what is wrong though it does; empty when all is well."""
        broken = [f"variant {name}: {reason}" for name, reason in self.broken.items()]
        plain = self.plain.notice if self.plain else ""
        return self.failure or self.withdrawn or "; ".join(filter(None, [self.warning, self.notice, plain, *broken]))

    @property
    def superseded(self) -> bool:
        """Whether its file was replaced by one that can be served."""
        return self.successor is not None and not self.successor.failure

    def card(self) -> str:
        """The model card, or nothing."""
        try:
            return (self.folder / CARD_NAME).read_text(encoding="utf-8")
        except OSError:
            return ""

    def check(self, service: str, trusted: Sequence[TrustedKey] = ()) -> None:
        """Reads the manifest and looks for its files, without opening them; fills `manifest`, `auto` and `broken`.

        Without a manifest, makes one from the graph, which is opened and tried for that. With `trusted` keys, one of
        them must have signed the manifest.

        Raises:
            ArtifactError: the version cannot be served.
        """
        if trusted and self.found.graph is not None:
            raise ArtifactError(
                f"{self.found.graph} has no manifest that could be signed, and this server takes signed models only "
                "(USAGI_TRUSTED_KEYS); publish it with a manifest"
            )
        if self.found.graph is not None:
            watched = {entry[0] for entry in self.found.files}
            self.plain = describe_plain(self.found.graph, service, self.name, self.version, watched)
            self.manifest, self.auto = self.plain.manifest, VARIANT
            return
        content = None
        if trusted:
            content, key = check_signed(self.folder / MANIFEST_NAME, trusted)
            self.signer = key.id
        manifest = read_manifest(self.folder, content)
        if manifest.service != service:
            raise ArtifactError(f"{self.folder} belongs to the service {manifest.service}")
        self.manifest, self.auto = manifest, manifest.auto_variant()
        for name, variant in manifest.variants.items():
            try:
                check_size(self.folder, variant)
            except ArtifactError as error:
                if name == self.auto:
                    raise
                self.broken[name] = error.message


@dataclass(frozen=True)
class Opener:
    """Makes variants ready to serve.

    Args:
        pool: runs their graphs.
        telemetry: is told of their batches.
        memory: counts their sessions.
        open_session: makes a session from the path of a verified graph, or its bytes.
        queue_size: see BatchLimits.
    """

    pool: ComputePool
    telemetry: Telemetry
    memory: SessionMemory
    open_session: Callable[[Path | bytes], Session] = OnnxSession
    queue_size: int = 100

    def open(self, entry: ModelVersion, name: str) -> ServedVariant:
        """Verifies, opens and warms a variant; runs in a thread, one at a time.

        The largest batch is warmed first: ONNX Runtime's arena then has room for every smaller one, and is smaller than
        when it grows step by step.

        Raises:
            ArtifactError: the file is not what the manifest says, or not a graph that runs.
        """
        manifest = entry.manifest
        if manifest is None:
            raise ArtifactError(f"{entry.folder} has no manifest that can be read")
        variant = manifest.variants[name]
        path = verify_variant(entry.folder, variant)
        assets = read_assets(entry.folder, manifest)
        graph = _signed_graph(entry, path, variant) if entry.signer else path
        max_batch = variant.max_batch if manifest.batchable else 1
        before = settle_before_measuring()
        try:
            session = self.open_session(graph)
            for batch in (max_batch, 1):
                if (feeds := _warming(entry, manifest, batch)) is not None:
                    session.run(feeds)
        except Exception as error:  # ONNX Runtime raises a class of its own for every kind of fault
            raise ArtifactError(f"{path} does not run: {error}") from error
        size = self.memory.count(session, variant.sha256, variant.bytes, private_bytes() - before)
        observer = self.telemetry.observer(entry.name, str(entry.version), name)
        limits = BatchLimits(max_batch=max_batch, queue_size=self.queue_size)
        batcher = Batcher(session, self.pool, limits, observer)
        providers = tuple(getattr(session, "providers", ()))
        return ServedVariant(manifest, name, batcher, observer, assets=assets, providers=providers, memory=size)


def _signed_graph(entry: ModelVersion, path: Path, variant: Variant) -> bytes:
    """The graph's bytes: of a signed version nothing is opened that was not checked."""
    if outside := read_onnx_file(path).data_files:
        raise ArtifactError(f"{path} has weights in `{outside[0]}`, which no signature covers; export it in one file")
    return read_verified(entry.folder, variant)


def _warming(entry: ModelVersion, manifest: Manifest, batch: int) -> Arrays | None:
    """What to warm a graph with; nothing if no inputs are known that it runs on."""
    if entry.plain is not None:
        return entry.plain.requests(batch)
    return zeros_for({spec.name: (spec.dtype, spec.shape) for spec in manifest.inputs}, batch)
