"""Continuous batching of decoders: one loop a model steps all running searches together; new ones join between two
steps.

The decoder's graph makes one step of any number of rows. It is given each row's cache (keys and values of the
positions before, and of the source) and returns this position's keys and values, which are put into the cache here.
The caches of all rows lie in arrays of a capacity that a step's rows fill from the front, so a step's inputs are
views and not copies. What a row's cache does not fill is hidden by its `position` and `source_length`. A recurrent
decoder has a state a row instead, which each step replaces.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from services.nlp.serving.search import BeamSearch, Floats, Next
from services.nlp.tokenizers.special import BOS
from shared.artifacts import TensorSpec
from shared.errors import DeadlinePassed
from shared.serving.served import Served
from shared.serving.session import Array

CAPACITY_STEP = 8
"""Positions by which a cache grows: small, since hidden positions are computed too."""
CROSS = "cross_"
NEW = "new_"
STEP_INPUTS = ("token", "tokens", "position", "source_length")
"""`tokens` `[rows, positions]` for a graph that can read several at once; a step reads one."""


@dataclass(eq=False, kw_only=True)
class StepRun(ABC):
    """Rows that step together with those of others, until it is over. It begins with one row.

    Attributes:
        deadline: time.monotonic() after which it is given up.
        over: nothing more is to be done: it has ended, or nobody waits for it.
        steps: steps so far.
        queue_seconds: from its arrival to its first step.
        infer_seconds: of its steps.
        batch_size: rows of its last step.
    """

    deadline: float = float("inf")
    over: bool = False
    steps: int = 0
    queue_seconds: float = 0.0
    infer_seconds: float = 0.0
    batch_size: int = 0

    @property
    @abstractmethod
    def rows(self) -> int:
        """Rows that it has now."""

    @property
    @abstractmethod
    def rows_at_most(self) -> int:
        """Rows that it may come to need."""

    @property
    @abstractmethod
    def start(self) -> Start:
        """Its first row."""

    @abstractmethod
    def advance(self, outputs: dict[str, Array], rows: slice) -> Next | None:
        """Takes its rows of a step's outputs; None if it is over."""


@dataclass(frozen=True)
class Start:
    """A row before its first step: the token to read at `position`, and what its caches hold already.

    `arrays`: caches `[1, heads, length, width]` and states `[1, width]` by input name; `source_length`: positions of
    the source without padding.
    """

    token: int
    position: int
    arrays: dict[str, Floats]
    source_length: int = 0


@dataclass(eq=False)
class Decoding(StepRun):
    """One sentence being translated.

    Attributes:
        search: says how it goes on.
        memory: what the encoder gave, by the step's input: the source's keys and values `[1, heads, S, width]`, or
            the first state `[1, width]`.
        source_length: S without padding.
    """

    search: BeamSearch
    memory: dict[str, Floats]
    source_length: int

    @property
    def rows(self) -> int:
        """See StepRun."""
        return self.search.rows

    @property
    def rows_at_most(self) -> int:
        """See StepRun."""
        return self.search.settings.beam

    @property
    def start(self) -> Start:
        """It reads BOS first."""
        return Start(BOS, 0, self.memory, self.source_length)

    def advance(self, outputs: dict[str, Array], rows: slice) -> Next | None:
        """See StepRun."""
        if self.over:
            return None
        self.steps += 1
        attention = None
        if self.search.keeps_attention:
            attention = outputs["attention"][rows, ..., : self.source_length].mean(axis=(1, 2))
        following = self.search.advance(outputs["log_probabilities"][rows], attention)
        self.over = following is None
        return following


class Cache:
    """The rows of all running decodings.

    Args:
        inputs: of the step's graph; all but STEP_INPUTS are caches `[rows, heads, positions, width]`, of which those
            of the source begin with CROSS, or states `[rows, width]`.
    """

    def __init__(self, inputs: Sequence[TensorSpec]) -> None:
        specs = [spec for spec in inputs if spec.name not in STEP_INPUTS and len(spec.shape) == 4]
        self._numbers = [spec.name for spec in inputs if spec.name in STEP_INPUTS]
        self._arrays: dict[str, Array] = {
            spec.name: np.zeros((1, spec.shape[1], CAPACITY_STEP, spec.shape[3]), np.float32) for spec in specs
        }
        self._own = [name for name in self._arrays if not name.startswith(CROSS)]
        self._cross = [name for name in self._arrays if name.startswith(CROSS)]
        self._states: dict[str, Array] = {
            spec.name: np.zeros((1, spec.shape[1]), np.float32)
            for spec in inputs
            if spec.name not in STEP_INPUTS and len(spec.shape) == 2
        }
        self.rows = 0
        self.token = np.zeros(1, np.int64)
        self.position = np.zeros(1, np.int64)
        self.source_length = np.zeros(1, np.int64)

    def add(self, run: StepRun) -> None:
        """Adds the first row of a run."""
        row, start = self.rows, run.start
        caches = {name: array for name, array in start.arrays.items() if name not in self._states}
        lengths = {name: array.shape[2] for name, array in caches.items()}
        self._reserve(row + 1, max((lengths.get(name, 0) for name in self._own), default=0), 0)
        self._reserve(row + 1, 0, max((lengths.get(name, 0) for name in self._cross), default=0))
        for name in self._states:
            self._states[name][row] = start.arrays[name][0]
        for name, array in caches.items():
            self._arrays[name][row, :, : array.shape[2]] = array[0]
        self.token[row], self.position[row], self.source_length[row] = start.token, start.position, start.source_length
        self.rows += 1

    def feeds(self) -> dict[str, Array]:
        """The next step's inputs, views of the rows."""
        numbers: dict[str, Array] = {
            "token": self.token,
            "tokens": self.token[:, None],
            "position": self.position,
            "source_length": self.source_length,
        }
        known = {name: numbers[name] for name in self._numbers}
        return {name: array[: self.rows] for name, array in (known | self._arrays | self._states).items()}

    def append(self, outputs: dict[str, Array]) -> None:
        """Puts a step's keys and values behind those of the positions before; states are replaced."""
        rows = np.arange(self.rows)
        self._reserve(self.rows, int(self.position[: self.rows].max()) + 1, 0)
        for name in self._own:
            new = outputs[NEW + name]
            self._arrays[name][rows, :, self.position[: self.rows]] = new if new.ndim == 3 else new[:, :, 0]
        for name, state in self._states.items():
            state[: self.rows] = outputs[NEW + name]
        self.position[: self.rows] += 1

    def select(self, parents: Sequence[int], tokens: Sequence[int]) -> None:
        """Makes the rows `parents`, in this order, some more than once, the only ones; they have read `tokens`."""
        count = len(parents)
        self._reserve(count, 0, 0)
        chosen = np.array(parents, np.int64)
        moved = np.flatnonzero(chosen != np.arange(count))
        if moved.size:  # the others stay where they are
            for array in (*self._arrays.values(), *self._states.values(), self.position, self.source_length):
                array[moved] = array[chosen[moved]]  # the right side is copied before anything is written
        self.token[:count] = tokens
        self.rows = count
        self._shrink()

    def _shrink(self) -> None:
        """Gives room back after a long sentence: hidden positions are computed too."""
        if not self.rows:
            return
        own, source = int(self.position[: self.rows].max()) + 1, int(self.source_length[: self.rows].max())
        for name, array in self._arrays.items():
            capacity = _rounded(source if name.startswith(CROSS) else own)
            if array.shape[2] > capacity + 2 * CAPACITY_STEP:
                self._arrays[name] = np.ascontiguousarray(array[:, :, :capacity])

    def _reserve(self, rows: int, positions: int, source: int) -> None:
        """Makes room; the arrays double their rows."""
        for name, array in self._arrays.items():
            wanted = source if name.startswith(CROSS) else positions
            capacity = max(array.shape[2], _rounded(wanted))
            if rows > len(array) or capacity > array.shape[2]:
                grown = np.zeros((_doubled(len(array), rows), array.shape[1], capacity, array.shape[3]), np.float32)
                grown[: self.rows, :, : array.shape[2]] = array[: self.rows]
                self._arrays[name] = grown
        if rows > len(self.token):
            size = _doubled(len(self.token), rows)
            self.token, self.position, self.source_length = (
                np.resize(array, size) for array in (self.token, self.position, self.source_length)
            )
            self._states = {name: np.resize(array, (size, array.shape[1])) for name, array in self._states.items()}


def _rounded(positions: int) -> int:
    return -(-positions // CAPACITY_STEP) * CAPACITY_STEP


def _doubled(have: int, need: int) -> int:
    while have < need:
        have *= 2
    return have


class DecodingBatch:
    """The runs that step together: `feeds` are a step's inputs, `settle` takes its outputs.

    Args:
        inputs: of the step's graph.
    """

    def __init__(self, inputs: Sequence[TensorSpec]) -> None:
        self._cache = Cache(inputs)
        self.running: list[StepRun] = []

    @property
    def reserved(self) -> int:
        """Rows that the running runs may come to need."""
        return sum(run.rows_at_most for run in self.running)

    def add(self, run: StepRun) -> None:
        """Takes a run in, between two steps."""
        self._cache.add(run)
        self.running.append(run)

    def feeds(self) -> dict[str, Array]:
        """The next step's inputs."""
        return self._cache.feeds()

    def settle(self, outputs: dict[str, Array]) -> list[StepRun]:
        """Tells every run of the step; returns those that are over, which leave."""
        self._cache.append(outputs)
        parents: list[int] = []
        tokens: list[int] = []
        stepped, first = self.running, 0
        for run in stepped:
            rows = slice(first, first + run.rows)
            following = run.advance(outputs, rows)
            if following is not None:
                parents += [first + parent for parent in following.parents]
                tokens += following.tokens
            first = rows.stop
        self._cache.select(parents, tokens)
        self.running = [run for run in stepped if not run.over]
        return [run for run in stepped if run.over]


class DecodingLoop:
    """Steps the runs of one served graph until none is left.

    Args:
        served: the step's graph; whoever waits for a run holds a lease on it.
    """

    def __init__(self, served: Served) -> None:
        self._inputs = served.manifest.inputs
        self._queue = served.batcher
        self._most_rows = served.manifest.variants[served.variant].max_batch
        self._waiting: deque[tuple[StepRun, float]] = deque()
        self._futures: dict[StepRun, asyncio.Future[None]] = {}
        self._batch = DecodingBatch(self._inputs)
        self._task: asyncio.Task[None] | None = None

    async def run(self, run: StepRun) -> None:
        """Steps it; returns when it is over.

        Raises:
            DeadlinePassed: before it was over.
        """
        future = self._futures[run] = asyncio.get_running_loop().create_future()
        self._waiting.append((run, time.perf_counter()))
        if self._task is None:
            # of no call's context: what the loop does is everybody's
            self._task = asyncio.create_task(self._loop(), context=contextvars.Context())
        try:
            await future
        finally:
            run.over = True
            del self._futures[run]

    async def _loop(self) -> None:
        try:
            while self._admit():
                result = await self._queue.submit(self._batch.feeds())
                self._expire()
                for run in self._batch.running:
                    run.infer_seconds += result.infer_seconds
                    run.batch_size = result.batch_size
                for run in self._batch.settle(result.outputs):
                    self._end(run)
        except Exception as error:
            for run in list(self._futures):
                self._end(run, error)
        finally:
            self._batch = DecodingBatch(self._inputs)  # frees its arrays
            self._task = None

    def _admit(self) -> bool:
        """Lets in whom there is room for, in order; returns whether anything is to be done."""
        self._expire()
        while self._waiting:
            run, arrived = self._waiting[0]
            full = self._batch.reserved + run.rows_at_most > self._most_rows
            if self._batch.running and full and not run.over:
                break
            self._waiting.popleft()
            if not run.over:
                run.queue_seconds = time.perf_counter() - arrived
                self._batch.add(run)
        return bool(self._batch.running)

    def _expire(self) -> None:
        now = time.monotonic()
        for run in list(self._futures):
            if now >= run.deadline:
                self._end(run, DeadlinePassed("the deadline passed before the text was complete"))

    def _end(self, run: StepRun, error: Exception | None = None) -> None:
        run.over = True
        future = self._futures.get(run)
        if future is None or future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


class DecodingLoops:
    """The loop of each served graph; gone with it."""

    def __init__(self) -> None:
        self._loops: WeakKeyDictionary[Served, DecodingLoop] = WeakKeyDictionary()

    def of(self, served: Served) -> DecodingLoop:
        """The loop of a leased graph."""
        loop = self._loops.get(served)
        if loop is None:
            loop = self._loops[served] = DecodingLoop(served)
        return loop
