"""Runs a plan: each step for the items that need it, independent steps side by side.

Which items a step ran for is a mask over the items of the request, None standing for all. Tensors go from step to step
as they are; only where some items are done and others go on are the others' rows copied.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shared.errors import DeadlinePassed, ModelUnavailable, Overloaded, code_of
from shared.serving.batching import BatchResult, BatchTimes
from shared.serving.calls import PIPELINES_HEADER, current_call
from shared.serving.model_observer import ModelObserver
from shared.serving.pipelines.checking import Plan, PlannedSource, PlannedStep
from shared.serving.pipelines.expressions import Reference
from shared.serving.pipelines.metrics import StepMetrics
from shared.serving.pipelines.steps import StepCaller, Tensors, named
from shared.serving.session import Array

MAX_DEPTH = 8
"""Pipelines that may call each other, one inside the other, over all servers."""

Mask = npt.NDArray[np.bool_] | None
_path: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("pipelines", default=())
"""The pipelines of this process that the current task runs inside of."""


class PipelineTooDeep(ModelUnavailable):
    """Pipelines call each other in a circle, or too many one inside the other."""

    reason = "PIPELINE_TOO_DEEP"


@dataclass
class PipelineRunner:
    """What a pipeline has in the place of a batcher: `admit` and `submit`.

    Attributes:
        name: `service/pipeline`.
        plan: what to run.
        caller: runs the steps.
        observer: of the pipeline as a model.
        metrics: of each step.
        capacity: requests that may be inside at a time.
        depth: pipelines one inside the other, this one included.
    """

    name: str
    plan: Plan
    caller: StepCaller
    observer: ModelObserver
    metrics: Sequence[StepMetrics]
    capacity: int
    depth: int = 1
    _admitted: int = field(default=0, init=False)

    @property
    def inside(self) -> int:
        """Requests in it."""
        return self._admitted

    @property
    def full(self) -> bool:
        """Whether all places are taken."""
        return self._admitted >= self.capacity

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Reserves a place, as a batcher does; each step takes one in its model's queue besides.

        Raises:
            Overloaded: all places are taken.
        """
        if self.full:
            self.observer.rejected("queue_full")
            raise Overloaded(
                f"all {self.capacity} places of the pipeline are taken; come back later",
                retry_after=0.5,
                metadata={"capacity": str(self.capacity)},
            )
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    async def submit(self, feeds: Tensors, deadline: float = float("inf")) -> BatchResult:
        """Runs the pipeline; `exit_steps` of the result names the last step of each item.

        Args:
            feeds: the pipeline's inputs by name.
            deadline: time.monotonic() after which the answer is worthless.

        Raises:
            UsagiError: a step failed; the message and the metadata name it.
        """
        call = current_call.get()
        came = call.headers.get(PIPELINES_HEADER, "") if call is not None else ""
        path = _path.get() or tuple(filter(None, came.split(",")))
        if self.name in path or len(path) >= MAX_DEPTH:
            shown = " → ".join((*path, self.name))
            raise PipelineTooDeep(f"pipelines call each other in a circle or more than {MAX_DEPTH} deep: {shown}")
        token = _path.set((*path, self.name))
        try:
            result = await _Run(self, feeds, deadline, (*path, self.name)).run()
        finally:
            _path.reset(token)
        if call is not None:
            model, version, variant = self.observer.labels
            call.answered_by = {"model": model, "version": version, "variant": variant, "batch": result.batch_size}
        return result


class _Run:
    """One request on its way."""

    def __init__(self, runner: PipelineRunner, feeds: Tensors, deadline: float, path: tuple[str, ...]) -> None:
        self._runner, self._plan, self._deadline, self._path = runner, runner.plan, deadline, path
        self._feeds = feeds
        self._rows = next(iter(feeds.values())).shape[0] if runner.plan.manifest.batchable else 1
        self._index = {step.definition.name: index for index, step in enumerate(self._plan.steps)}
        self._outputs: list[Tensors] = [{} for _ in self._plan.steps]
        self._ran: list[Mask] = [np.zeros(self._rows, np.bool_) for _ in self._plan.steps]
        self._batch = 0
        self._cached: list[bool] = []
        self._queue_seconds = self._infer_seconds = 0.0

    async def run(self) -> BatchResult:
        if self._plan.linear:
            for index in range(len(self._plan.steps)):
                await self._step(index)
        else:
            await _side_by_side(self._step, [step.after for step in self._plan.steps])
        outputs = {name: self._gather(source, None) for name, source in self._plan.outputs.items()}
        exits = self._exits()
        self._runner.observer.answered(BatchTimes(1, self._rows, self._queue_seconds, 0.0, self._infer_seconds, 0.0))
        cached = bool(self._cached) and all(self._cached)
        return BatchResult(outputs, self._batch, self._queue_seconds, self._infer_seconds, exits, cached)

    async def _step(self, index: int) -> None:
        step = self._plan.steps[index]
        wanted = self._wanted(step)
        if wanted is not None and not wanted.any():
            return
        feeds = {name: self._gather(source, wanted) for name, source in step.inputs.items()}
        items = self._rows if wanted is None else int(np.count_nonzero(wanted))
        result = await self._call(step, index, feeds, items)
        if self._plan.manifest.batchable and any(array.shape[:1] != (items,) for array in result.outputs.values()):
            shapes = {name: array.shape for name, array in result.outputs.items()}
            raise named(ModelUnavailable(f"answers {shapes} for {items} items"), self._runner.name, step)
        self._outputs[index], self._ran[index] = result.outputs, wanted
        self._batch = max(self._batch, result.batch_size)
        self._cached.append(result.cached)
        self._queue_seconds += result.queue_seconds
        self._infer_seconds += result.infer_seconds

    async def _call(self, step: PlannedStep, index: int, feeds: Tensors, items: int) -> BatchResult:
        call, definition = current_call.get(), step.definition
        attributes = {"usagi.step": definition.name, "usagi.model": definition.model, "usagi.items": items}
        span = call.span.step(f"step {definition.name}", attributes) if call and call.span else nullcontext()
        started, code = time.perf_counter(), "OK"
        try:
            with span:
                if time.monotonic() >= self._deadline:
                    raise DeadlinePassed("the deadline passed before the step began")
                return await self._runner.caller.call(step, feeds, self._deadline, self._path)
        except BaseException as error:
            code = code_of(error)
            if isinstance(error, Exception):
                raise named(error, self._runner.name, step) from error
            raise
        finally:
            self._runner.metrics[index].called(code, time.perf_counter() - started, items)

    def _wanted(self, step: PlannedStep) -> Mask:
        """The items that have everything that the step names and for which `when` holds."""
        wanted: Mask = None
        for source in step.inputs.values():
            wanted = _both(wanted, self._available(source))
        when = step.definition.when
        if when is not None and (wanted is None or wanted.any()):
            array, mask = self._value(when.expression.reference)
            holds = np.zeros(self._rows, np.bool_)
            if array is not None:
                holds[slice(None) if mask is None else mask] = when.evaluate(array)
            wanted = _both(wanted, holds)
        return None if wanted is not None and wanted.all() else wanted

    def _value(self, reference: Reference) -> tuple[Array | None, Mask]:
        """The tensor and the items that it has; no tensor if the step ran for none."""
        if not reference.step:
            return self._feeds[reference.tensor], None
        index = self._index[reference.step]
        return self._outputs[index].get(reference.tensor), self._ran[index]

    def _available(self, planned: PlannedSource) -> Mask:
        available = np.zeros(self._rows, np.bool_)
        for alternative in planned.source.alternatives:
            mask = None if isinstance(alternative, float) else self._value(alternative.reference)[1]
            if mask is None:
                return None
            available |= mask
        return available

    def _gather(self, planned: PlannedSource, wanted: Mask) -> Array:
        """The rows of the wanted items, which all have the source: of each the first alternative that it has."""
        left = np.ones(self._rows, np.bool_) if wanted is None else wanted.copy()
        result: Array | None = None
        for alternative in planned.source.alternatives:
            if isinstance(alternative, float):
                part = left.copy()
                shape = (int(part.sum()), *planned.spec.shape[1:])
                rows = np.full(shape, alternative, dtype=planned.spec.dtype)
            else:
                array, mask = self._value(alternative.reference)
                if array is None:
                    continue
                array = alternative.evaluate(array)
                if result is None and (mask is None or mask is wanted):
                    return _take(array, mask, wanted)
                part = left if mask is None else left & mask
                if not part.any():
                    continue
                rows = _take(array, mask, part)
            if result is None:
                result = np.empty((left.sum(), *rows.shape[1:]), rows.dtype)
            if result.shape[1:] != rows.shape[1:]:
                raise ModelUnavailable(
                    f"`{planned.spec.name}` and its alternatives have the shapes {result.shape[1:]} and "
                    f"{rows.shape[1:]} for different items"
                )
            result[part if wanted is None else part[wanted]] = rows
            left = left & ~part
            if not left.any():
                break
        assert result is not None
        return result

    def _exits(self) -> tuple[str, ...]:
        """The last step that each item came to, and the count of them in the metrics."""
        last = np.full(self._rows, -1)
        for index, mask in enumerate(self._ran):
            last[slice(None) if mask is None else mask] = index
        counts = np.bincount(last + 1, minlength=len(self._plan.steps) + 1)[1:]
        for metrics, count in zip(self._runner.metrics, counts.tolist(), strict=True):
            if count:
                metrics.exits.inc(count)
        names = [*(step.definition.name for step in self._plan.steps), ""]
        return tuple(names[index] for index in last.tolist())


def _both(one: Mask, other: Mask) -> Mask:
    if one is None or other is None:
        return other if one is None else one
    return one & other


def _take(array: Array, mask: Mask, wanted: Mask) -> Array:
    """The wanted rows of an array that has the rows of `mask`; the array itself where these are the same."""
    if mask is wanted:
        return array
    if wanted is None or mask is None:
        return array if wanted is None else array[wanted]
    return array[wanted[mask]]


async def _side_by_side(run: Callable[[int], Awaitable[None]], after: Sequence[Sequence[int]]) -> None:
    """Runs every step when those that it names are done; the first failure cancels the others."""
    done = [asyncio.Event() for _ in after]

    async def in_turn(index: int) -> None:
        for other in after[index]:
            await done[other].wait()
        await run(index)
        done[index].set()

    try:
        async with asyncio.TaskGroup() as group:
            for index in range(len(after)):
                group.create_task(in_turn(index))
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
