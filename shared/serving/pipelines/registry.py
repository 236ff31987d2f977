"""The pipelines of one serving process: found in the model roots, checked against their models again and again.

A pipeline is ready when all its steps are. What it depends on comes and goes without it, so the check is made anew at
every rescan: a step's model that is gone or an upstream that does not answer makes it not ready, with the cause, until
it is back. Its plan is kept meanwhile, and calls that do not come to the broken step are answered. What does not fit
together has no plan and answers nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from shared.artifacts import ArtifactError, Manifest
from shared.errors import ModelNotFound, ModelUnavailable, Unreachable, UsagiError, code_of
from shared.serving.model_folders import PIPELINE_NAME, FoundModel, FoundVersion, Scan, scan
from shared.serving.model_observer import ModelObserver
from shared.serving.model_table import UNLOADED
from shared.serving.pipelines.checking import Plan, StepModel, make_plan
from shared.serving.pipelines.definition import PipelineDefinition, StepDefinition, read_definition
from shared.serving.pipelines.metrics import PipelineMetrics
from shared.serving.pipelines.running import MAX_DEPTH, PipelineRunner
from shared.serving.pipelines.steps import StepCaller
from shared.serving.pipelines.upstreams import Upstreams
from shared.serving.repository import AUTO, ModelRepository
from shared.serving.served import Served
from shared.serving.telemetry import Telemetry
from shared.serving.traffic import UNROUTED, ShadowDropped, Traffic, traffic
from shared.serving.versions import ModelVersion, State
from shared.signatures import TrustedKey, check_signed, pipeline_place

log = logging.getLogger(__name__)

MAX_TRAIL = 100
"""Of pipelines that name each other, followed in one go."""
VARIANT = "pipeline"
"""What stands in the place of a variant in answers and metrics."""
_Probes = Mapping[tuple[str, str, str], StepModel | UsagiError]


@dataclass(frozen=True)
class ServedPipeline:
    """A pipeline as a request sees it; see Served."""

    manifest: Manifest
    batcher: PipelineRunner
    observer: ModelObserver
    variant: str = VARIANT
    assets: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """The version as the API shows it."""
        return str(self.manifest.version)


@dataclass(eq=False)
class PipelineVersion(ModelVersion):
    """A version of a pipeline. `failure`: its file is wrong, until it changes; `problem`: not ready just now."""

    definition: PipelineDefinition | None = None
    plan: Plan | None = None
    models: dict[str, StepModel] = field(default_factory=dict)
    served: ServedPipeline | None = None
    problem: UsagiError | None = None

    @property
    def depth(self) -> int:
        """Pipelines one inside the other, this one included."""
        return self.served.batcher.depth if self.served else 1

    @property
    def state(self) -> State:
        """Whether it can answer whatever is asked."""
        if self.withdrawn and not self.failure:
            return State.UNLOADED
        return State.FAILED if self.failure or self.problem or self.plan is None else State.READY

    @property
    def reason(self) -> str:
        """Why it cannot answer, or what is wrong though it does."""
        problem = self.problem.message if self.problem else ""
        return self.failure or self.withdrawn or "; ".join(filter(None, [problem, self.warning]))


class PipelineRegistry:
    """All versions of all pipelines of one service.

    Args:
        service: the domain; the folder below each root.
        roots: model roots, searched in order.
        repository: the models.
        telemetry: is told of calls.
        upstreams: the other servers.
        capacity: requests that may be inside a pipeline at a time.
        trusted_keys: with any, only pipelines that one of them signed are served.
    """

    def __init__(
        self,
        service: str,
        roots: Iterable[Path],
        repository: ModelRepository,
        telemetry: Telemetry,
        upstreams: Upstreams,
        capacity: int,
        trusted_keys: tuple[TrustedKey, ...] = (),
    ) -> None:
        self.service, self.roots = service, tuple(roots)
        self.caller = StepCaller(upstreams)
        self._repository, self._telemetry, self._upstreams = repository, telemetry, upstreams
        self._metrics = PipelineMetrics(telemetry)
        self._capacity = capacity
        self._trusted = trusted_keys
        self._pipelines: dict[str, list[PipelineVersion]] = {}
        self._named: frozenset[str] = frozenset()
        self._unloaded: set[tuple[str, int | None]] = set()
        self._changing = asyncio.Lock()

    # What there is

    def __contains__(self, name: str) -> bool:
        return name in self._named

    def versions(self) -> list[PipelineVersion]:
        """All versions, by name and number."""
        return [entry for name in sorted(self._pipelines) for entry in self._pipelines[name]]

    def find(self, name: str, version: str = "") -> PipelineVersion:
        """The version that a request means; an empty version is the newest that is ready.

        Raises:
            ModelNotFound: no such version.
        """
        entries = self._pipelines[name]
        if version == "":
            return next((entry for entry in reversed(entries) if entry.state is State.READY), entries[-1])
        for entry in entries:
            if str(entry.version) == version:
                return entry
        raise ModelNotFound("version", version, [str(entry.version) for entry in entries])

    # Requests

    @asynccontextmanager
    async def acquire(self, name: str, version: str = "", variant: str = "") -> AsyncIterator[Served]:
        """Leases a pipeline for one request.

        Raises:
            ModelNotFound: no such version or variant.
            ModelUnavailable: it does not fit together, or is unloaded.
            Unreachable: an upstream has not answered yet.
            ShadowDropped: this is the copy of a call; pipelines are not shadowed.
        """
        if variant not in ("", AUTO, VARIANT):
            raise ModelNotFound("variant", variant, [AUTO, VARIANT])
        call = traffic.get()
        if call.shadow:
            for number in call.versions.get(name, ())[:1]:
                self._telemetry.shadow_dropped.labels(name, number, "unavailable").inc()
            raise ShadowDropped("a pipeline runs no copies of calls")
        served = self._answering(self._chosen(call, name, version))
        started, code = time.perf_counter(), "OK"
        try:
            with served.observer.request():
                yield served
        except BaseException as error:
            code = code_of(error)
            raise
        finally:
            if call is not UNROUTED and name in call.versions:
                seconds = self._telemetry.version_seconds.labels(name, served.version, call.kind, code)
                seconds.observe(time.perf_counter() - started)

    def _chosen(self, call: Traffic, name: str, version: str) -> PipelineVersion:
        """The first version of the canary's that is ready, unless the call names one."""
        for number in call.versions.get(name, ()) if version == "" else ():
            for entry in self._pipelines[name]:
                if str(entry.version) == number and entry.state is State.READY:
                    return entry
        return self.find(name, version)

    def _answering(self, entry: PipelineVersion) -> ServedPipeline:
        if entry.served is not None and not entry.withdrawn:
            return entry.served
        text = f"pipeline {entry.name} version {entry.version} is {entry.state.value}: {entry.reason}"
        metadata = {"model": entry.name, "version": str(entry.version)}
        waits = isinstance(entry.problem, Unreachable) and not entry.withdrawn
        raise Unreachable(text, metadata=metadata) if waits else ModelUnavailable(text, metadata=metadata)

    # Changes

    async def rescan(self) -> None:
        """Brings the table up to date with the roots, and every pipeline with the models of its steps."""
        async with self._changing:
            found = await asyncio.to_thread(scan, self.roots, self.service)
            for name in sorted({*found.pipelines, *self._pipelines}):
                await self._update(name, found)
            models = {entry.name for entry in self._repository.versions()}
            self._named = frozenset(self._pipelines) - models
            probes = await self._probe()
            resolved: set[PipelineVersion] = set()
            for entry in self.versions():
                self._resolve(entry, probes, resolved, ())

    async def _update(self, name: str, found: Scan) -> None:
        there = found.pipelines.get(name, FoundModel()).versions
        following: dict[int, PipelineVersion] = {}
        known = {entry.version: entry for entry in self._pipelines.get(name, [])}
        for number, version in there.items():
            entry = known.get(number)
            if entry is None or self._differs(entry, version):
                entry = PipelineVersion(name, number, version)
                try:
                    entry.definition = await asyncio.to_thread(self._read, name, number, version.folder / PIPELINE_NAME)
                except ArtifactError as error:
                    self._fail(entry, error.message)
            entry.warning = ""
            following[number] = entry
        for number, entry in known.items():
            cause = found.cause_for(entry.folder)
            if cause and number not in following:
                entry.warning = f"{cause}; serving from memory"
                following[number] = entry
            elif following.get(number) is not entry:
                self._retire(entry)
        for entry in following.values():
            out = (name, None) in self._unloaded or (name, entry.version) in self._unloaded
            entry.withdrawn = UNLOADED if out else ""
        if following:
            self._pipelines[name] = [following[number] for number in sorted(following)]
        else:
            self._pipelines.pop(name, None)

    @staticmethod
    def _differs(entry: PipelineVersion, version: FoundVersion) -> bool:
        before = entry.found
        if (before.folder, before.published) != (version.folder, version.published):
            return True
        return bool(entry.failure) and before.files != version.files  # signed meanwhile, say

    def _read(self, name: str, number: int, path: Path) -> PipelineDefinition:
        """The definition, signed by a trusted key where there are such."""
        content = None
        if self._trusted:
            content, _ = check_signed(path, self._trusted, pipeline_place(self.service, name, number))
        return read_definition(path, content)

    async def _probe(self) -> _Probes:
        """Asks every upstream about the models of all steps, at once."""
        steps = {
            (step.upstream, step.model, step.version): step
            for entry in self.versions()
            if entry.definition
            for step in entry.definition.steps
            if step.upstream
        }

        async def describe(step: StepDefinition) -> StepModel | UsagiError:
            try:
                return await self._upstreams.describe(step)
            except UsagiError as error:
                return error

        return dict(zip(steps, await asyncio.gather(*map(describe, steps.values())), strict=True))

    def _resolve(
        self, entry: PipelineVersion, probes: _Probes, resolved: set[PipelineVersion], trail: tuple[str, ...]
    ) -> None:
        """Checks a pipeline against the models of its steps, those that are pipelines first."""
        if entry in resolved or entry.definition is None:
            return
        before, problem = (entry.state, entry.reason), None
        models: dict[str, StepModel] = {}
        trail = (*trail, entry.name)
        try:
            if entry.name not in self._named:
                raise ArtifactError(f"{entry.name} is the name of a model too; call the pipeline otherwise")
            for step in entry.definition.steps:
                try:
                    models[step.name] = self._model(step, probes, resolved, trail)
                except UsagiError as error:
                    error.message = f"{step.shown}: {error.message}"
                    problem = problem or error
                    if isinstance(error, ArtifactError):
                        raise
            if problem is None and (entry.plan is None or models != entry.models):
                self._take_over(entry, models)
        except ArtifactError as error:
            problem, entry.plan, entry.served = error, None, None
        entry.problem = problem
        resolved.add(entry)
        if (entry.state, entry.reason) != before:
            names = {"model": entry.name, "version": entry.version}
            if entry.problem:
                self._telemetry.load_failures.inc()
                log.error("pipeline not ready", extra={**names, "reason": entry.reason})
            else:
                log.info("pipeline ready", extra=names)

    def _model(
        self, step: StepDefinition, probes: _Probes, resolved: set[PipelineVersion], trail: tuple[str, ...]
    ) -> StepModel:
        """What a step's model takes and gives.

        Raises:
            ArtifactError: it cannot be a step of this pipeline.
            UsagiError: it is not ready, or not there yet.
        """
        if step.upstream:
            told = probes.get((step.upstream, step.model, step.version), Unreachable("not asked yet"))
            if isinstance(told, UsagiError):
                raise type(told)(told.message)
            return told
        if step.model in self._named:
            inner = self.find(step.model, step.version)
            if inner.name in trail:
                raise ArtifactError(f"pipelines call each other in a circle: {' → '.join((*trail, inner.name))}")
            if len(trail) <= MAX_TRAIL:
                self._resolve(inner, probes, resolved, trail)
            inner = self.find(step.model, step.version)
            if inner.depth >= MAX_DEPTH:
                raise ArtifactError(f"pipelines may be at most {MAX_DEPTH} deep, one inside the other")
            entry: ModelVersion = inner
            manifest = inner.plan.manifest if inner.plan else None
        else:
            entry = self._repository.find(step.model, step.version)
            manifest = entry.manifest
        if entry.state not in (State.READY, State.AVAILABLE) or manifest is None:
            raise ModelUnavailable(f"version {entry.version} is {entry.state.value}: {entry.reason}")
        known = [VARIANT] if step.model in self._named else [*manifest.variants]
        if step.variant not in ("", AUTO, *known):
            raise ModelNotFound("variant", step.variant, [AUTO, *known])
        if step.variant in entry.broken:
            raise ModelUnavailable(entry.broken[step.variant])
        return StepModel(manifest.inputs, manifest.outputs, manifest)

    def _take_over(self, entry: PipelineVersion, models: dict[str, StepModel]) -> None:
        """Plans the pipeline over these models."""
        assert entry.definition is not None
        plan = make_plan(self.service, entry.name, entry.version, entry.definition, models)
        version = str(entry.version)
        observer = self._telemetry.observer(entry.name, version, VARIANT)
        metrics = self._metrics.observer(entry.name, version, [step.name for step in entry.definition.steps])
        inner = [self.find(step.model, step.version) for step in self._local_pipelines(entry.definition)]
        runner = PipelineRunner(
            name=f"{self.service}/{entry.name}",
            plan=plan,
            caller=self.caller,
            observer=observer,
            metrics=metrics,
            capacity=self._capacity,
            depth=1 + max((other.depth for other in inner), default=0),
        )
        self._telemetry.loaded(observer.labels, seconds=0.0, size_bytes=0, depth=lambda: runner.inside)
        entry.plan, entry.models, entry.manifest = plan, models, plan.manifest
        entry.served = ServedPipeline(plan.manifest, runner, observer)

    def _local_pipelines(self, definition: PipelineDefinition) -> list[StepDefinition]:
        """The steps that are pipelines of this process."""
        return [step for step in definition.steps if not step.upstream and step.model in self._named]

    def _fail(self, entry: PipelineVersion, reason: str) -> None:
        entry.failure = reason
        self._telemetry.load_failures.inc()
        log.error("pipeline failed", extra={"model": entry.name, "version": entry.version, "reason": reason})

    def _retire(self, entry: PipelineVersion) -> None:
        if entry.served is not None:
            self._telemetry.forget(*entry.served.observer.labels)
            self._metrics.forget(entry.name, str(entry.version))
        log.info("pipeline retired", extra={"model": entry.name, "version": entry.version})

    async def load(self, name: str, version: str = "") -> PipelineVersion:
        """Takes an unloading back and checks the pipeline now; raises as `acquire` does."""
        self._unloaded -= {key for key in self._unloaded if key[0] == name and version in ("", str(key[1]))}
        await self.rescan()
        if name not in self:
            raise ModelNotFound("model", name, sorted(self._named))
        entry = self.find(name, version)
        self._answering(entry)
        return entry

    def unload(self, name: str, version: str = "") -> list[ModelVersion]:
        """Stops serving one version, or all with those still to come; running calls finish.

        Raises:
            ModelNotFound: no such version.
        """
        first = self.find(name, version)
        entries: list[ModelVersion] = [first] if version else [*self._pipelines[name]]
        self._unloaded.add((name, first.version if version else None))
        for entry in entries:
            entry.withdrawn = UNLOADED
            log.info("model withdrawn", extra={"model": name, "version": entry.version, "reason": UNLOADED})
        return entries

    async def close(self) -> None:
        """Ends the channels to the upstreams."""
        await self._upstreams.close()
