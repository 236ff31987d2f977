"""Greedy dynamic batching: take what waits, run it, repeat.

A window that waits for more items costs its length at low load and gains nothing at high load, where the queue is
full anyway. So nothing ever waits on purpose: a lonely call runs at once, and while the threads are busy the queue
grows into the next batch. A batch is formed only when a thread is free to run it, so an item whose caller left or whose
deadline passed is dropped before it costs anything. Batches are not padded: ONNX Runtime runs any size without
compiling it first.

Graphs so small that a thread's turn costs more than their run are run by the event loop itself.

All state belongs to the event loop; only `Batcher.execute` runs in a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from shared.errors import DeadlinePassed, ModelUnavailable, Overloaded
from shared.serving.calls import CallScope, current_call
from shared.serving.session import Array, Arrays, Session

QUICK_SECONDS, QUICK_BYTES = 0.0002, 16_384
"""A run of less CPU, on inputs not larger, costs less than handing it to a thread and back: the event loop runs it."""

TRANSIT_SECONDS = 0.05
"""A caller's clock may end its call this much before ours, which began when the call arrived."""


@dataclass(frozen=True)
class BatchLimits:
    """`max_batch` items run at once; `queue_size` more may wait for each batch in flight's place."""

    max_batch: int = 8
    queue_size: int = 100


class BatchResult(NamedTuple):
    """The outputs of one request, views into the batch's arrays, and how they came about.

    `exit_steps`: of a pipeline, the last step of each item. `cached`: they come from another request's run and are
    read-only.
    """

    outputs: dict[str, Array]
    batch_size: int
    queue_seconds: float
    infer_seconds: float
    exit_steps: tuple[str, ...] = ()
    cached: bool = False


class BatchReport(NamedTuple):
    """How a batch ran: its rows, time.perf_counter() of its start, its seconds, and of each item, oldest first, the
    call that it belongs to and time.perf_counter() of its arrival in the queue."""

    rows: int
    started: float
    seconds: float
    calls: list[CallScope | None]
    enqueued: list[float]


class BatchTimes(NamedTuple):
    """One run: how many requests and rows it answered, and where its seconds went; `queue_seconds` is their sum."""

    requests: int
    rows: int
    queue_seconds: float
    input_seconds: float
    infer_seconds: float
    output_seconds: float


class BatchObserver:
    """What the batcher tells the outside; telemetry overrides it. All calls come from the event loop."""

    def rejected(self, reason: str) -> None:
        """An item was refused before it waited; `reason` is `queue_full`."""

    def dropped(self, reason: str) -> None:
        """An item was dropped before it ran; `reason` is `deadline` or `cancelled`."""

    def ran(self, report: BatchReport) -> None:
        """A batch ran."""

    def answered(self, times: BatchTimes) -> None:
        """A batch ran without a fault."""

    def cached(
        self, call: CallScope | None, kind: str, batch_size: int, lookup_seconds: float, queue_seconds: float
    ) -> None:
        """A request got what another one's run gave: `hit`, one before it, or `shared`, one that it waited for."""

    def missed(self, seconds: float) -> None:
        """A run's answer was kept for later; `seconds` are those of looking for it before and of keeping it."""

    def forgotten(self) -> None:
        """An answer that was kept made room for another."""


class QueuedItem:
    """One request in the queue, and who waits for it.

    Args:
        feeds: the graph's inputs by name.
        deadline: time.monotonic() after which the answer is worthless.
        call: whose item it is, for metrics and spans.
    """

    __slots__ = ("call", "deadline", "enqueued", "feeds", "rows", "signature")

    def __init__(self, feeds: Arrays, deadline: float, call: CallScope | None) -> None:
        self.feeds, self.deadline, self.call = feeds, deadline, call
        self.rows = 1
        signature: list[object] = []
        for name, array in feeds.items():
            shape = array.shape
            if shape and shape[0] > self.rows:
                self.rows = shape[0]
            signature += (name, shape[1:], array.dtype)
        self.signature = tuple(signature)
        self.enqueued = time.perf_counter()

    def abandoned(self) -> bool:
        """Whether nobody waits any more."""
        raise NotImplementedError

    def answer(self, result: BatchResult) -> None:
        """It ran."""
        raise NotImplementedError

    def fail(self, error: Exception) -> None:
        """It failed, or its deadline passed before it ran."""
        raise NotImplementedError


class AwaitedItem(QueuedItem):
    """For whom a task waits."""

    __slots__ = ("future",)

    def __init__(self, feeds: Arrays, deadline: float, call: CallScope | None) -> None:
        super().__init__(feeds, deadline, call)
        self.future: asyncio.Future[BatchResult] = asyncio.get_running_loop().create_future()

    def abandoned(self) -> bool:
        """See QueuedItem."""
        return self.future.done()

    def answer(self, result: BatchResult) -> None:
        """See QueuedItem."""
        self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        """See QueuedItem."""
        self.future.set_exception(error)


_Answer = dict[str, Array] | Exception


@dataclass(frozen=True)
class _Outcome:
    """An answer for each item, and when things happened in time.perf_counter()."""

    answers: list[_Answer]
    together: bool
    started: float
    joined: float
    ran: float
    split: float
    cpu_seconds: float

    @property
    def seconds(self) -> float:
        return self.ran - self.started


class ComputePool:
    """The threads that run graphs, shared by all models of a process; models with waiting items take turns."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="onnx")
        self._idle = workers
        self._waiting: deque[Batcher] = deque()
        self._dispatching = False
        self._idlers: list[asyncio.Future[None]] = []

    def schedule(self, batcher: Batcher) -> None:
        """Says that `batcher` has items; it is asked for a batch as soon as a thread is free."""
        if batcher not in self._waiting:
            self._waiting.append(batcher)
        if self._idle and not self._dispatching:
            # one turn of the loop later, so that calls that arrive together run together
            self._dispatching = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatching = False
        loop = asyncio.get_running_loop()
        while self._idle and self._waiting:
            batcher = self._waiting.popleft()
            batch = batcher.take()
            if batcher.depth:
                self._waiting.append(batcher)
            if batch and batcher.is_quick(batch):
                batcher.settle(batch, batcher.execute(batch))
            elif batch:
                self._idle -= 1
                self._executor.submit(self._work, loop, batcher, batch)
        if self._idle and self._idlers:
            self._wake_idlers()

    def _wake_idlers(self) -> None:
        for idler in self._idlers:
            if not idler.done():
                idler.set_result(None)
        self._idlers.clear()

    async def wait_idle(self) -> None:
        """Waits until nothing waits and a thread is free besides a spare one: for work of lower priority.

        The spare one, of several, stays free for live calls even while a run of lower priority hangs.
        """
        spare = min(1, self.workers - 1)
        while self._idle <= spare or self._waiting:
            idler: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._idlers.append(idler)
            await idler

    def _work(self, loop: asyncio.AbstractEventLoop, batcher: Batcher, batch: list[QueuedItem]) -> None:
        outcome = batcher.execute(batch)
        loop.call_soon_threadsafe(self._settle, batcher, batch, outcome)

    def _settle(self, batcher: Batcher, batch: list[QueuedItem], outcome: _Outcome) -> None:
        self._idle += 1
        self._dispatch()  # the thread first, the answers after
        batcher.settle(batch, outcome)

    def close(self) -> None:
        """Lets running batches finish and ends the threads."""
        self._executor.shutdown(wait=True)


class ClosedSession:
    """Stands where the session was after a batcher was closed; what still runs has no caller any more."""

    def run(self, feeds: Arrays) -> dict[str, Array]:
        """Refuses."""
        raise ModelUnavailable("the model was unloaded while the request waited")


BatcherKind = TypeVar("BatcherKind", bound="Batcher")


class Batcher:
    """The queue of one graph.

    At most `queue_size + max_batch * workers` requests are inside at a time: one full batch a thread, and the queue.

    Args:
        session: runs a batch.
        pool: the threads.
        limits: batch and queue size.
        observer: is told what happens.
    """

    def __init__(
        self, session: Session, pool: ComputePool, limits: BatchLimits, observer: BatchObserver | None = None
    ) -> None:
        self._session: Session = session
        self._pool = pool
        self._observer = observer or BatchObserver()
        self._queue: dict[QueuedItem, None] = {}  # insertion-ordered, and an item in the middle leaves in O(1)
        self._admitted = 0
        self._recent_seconds = self._recent_cpu = 0.05
        self.limits = limits
        self.capacity = limits.queue_size + limits.max_batch * pool.workers

    @property
    def depth(self) -> int:
        """Number of items that wait."""
        return len(self._queue)

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Reserves a place before any work, preprocessing included, is done for a request.

        Raises:
            Overloaded: all places are taken.
        """
        if self.full:
            raise self.refusal()
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    def enter(self, item: QueuedItem) -> None:
        """As `admit` and `submit` for an item that is told its outcome, and whose maker calls `leave` after that."""
        self._admitted += 1
        self._queue[item] = None
        self._pool.schedule(self)

    def leave(self) -> None:
        """Gives a place back that `enter` took."""
        self._admitted -= 1

    @property
    def full(self) -> bool:
        """Whether all places are taken."""
        return self._admitted >= self.capacity

    def refusal(self) -> Overloaded:
        """The error of a request that finds no place; it counts as rejected."""
        self._observer.rejected("queue_full")
        return Overloaded(
            f"all {self.capacity} places of the queue are taken; come back later",
            retry_after=self._drain_seconds(),
            metadata={"capacity": str(self.capacity)},
        )

    def _drain_seconds(self) -> float:
        batches = self.capacity / (self.limits.max_batch * self._pool.workers)
        return min(30.0, max(0.05, batches * self._recent_seconds))

    async def submit(self, feeds: Arrays, deadline: float = float("inf")) -> BatchResult:
        """Runs `feeds` in the next batch; all arrays have the same number of rows as first dimension.

        The caller holds a place by `admit`.

        Args:
            feeds: the graph's inputs by name.
            deadline: time.monotonic() after which the answer is worthless.

        Raises:
            DeadlinePassed: the deadline passed before the item ran.
        """
        item = AwaitedItem(feeds, deadline, current_call.get())
        self._queue[item] = None
        self._pool.schedule(self)
        try:
            return await item.future
        except asyncio.CancelledError:
            self.withdraw(item)
            raise

    def withdraw(self, item: QueuedItem) -> None:
        """Nobody waits for the item any more: drops it, unless it runs already."""
        if item in self._queue:
            del self._queue[item]
            # gRPC cancels a call when its deadline passes, so look which of the two it was
            late = time.monotonic() >= item.deadline - TRANSIT_SECONDS
            self._observer.dropped("deadline" if late else "cancelled")

    def renewed(self, kind: type[BatcherKind]) -> BatcherKind:
        """An empty queue of another kind before the same graph; those who are in this one are answered by it."""
        return kind(self._session, self._pool, self.limits, self._observer)

    def close(self) -> None:
        """Gives the session up; call it when no request is inside."""
        self._session = ClosedSession()

    def take(self) -> list[QueuedItem]:
        """The next batch: the oldest item and those behind it that fit with it, without the dead."""
        batch: list[QueuedItem] = []
        rows = 0
        now = time.monotonic()
        for item in list(self._queue):
            if item.abandoned():
                self.withdraw(item)
            elif item.deadline <= now:
                del self._queue[item]
                self._observer.dropped("deadline")
                item.fail(DeadlinePassed("the deadline passed while the request waited in the queue"))
            elif batch and (item.signature != batch[0].signature or rows + item.rows > self.limits.max_batch):
                break  # order is kept: nobody overtakes
            else:
                del self._queue[item]
                batch.append(item)
                rows += item.rows
            if rows >= self.limits.max_batch:
                break
        return batch

    def is_quick(self, batch: list[QueuedItem]) -> bool:
        """Whether recent runs were so short, and this one's inputs are so small, that it needs no thread."""
        if self._recent_cpu > QUICK_SECONDS or not getattr(self._session, "only_computes", False):
            return False
        return sum(array.nbytes for item in batch for array in item.feeds.values()) <= QUICK_BYTES

    def execute(self, batch: list[QueuedItem]) -> _Outcome:
        """Joins the inputs, runs them and splits the outputs; called in a thread, or quickly, and never raises.

        When a joined run fails, each request runs alone, so that a bad one does not fail its neighbours.
        """
        started = joined = time.perf_counter()
        cpu = time.thread_time()
        try:
            feeds = _join(batch)
            joined = time.perf_counter()
            outputs = self._session.run(feeds)
            ran = time.perf_counter()
            answers: list[_Answer] = [*_split(outputs, batch)]
            return _Outcome(answers, True, started, joined, ran, time.perf_counter(), time.thread_time() - cpu)
        except Exception as error:  # whatever the graph does, its callers get an answer
            answers = [error] if len(batch) == 1 else [self._run_alone(item) for item in batch]
        ended = time.perf_counter()
        return _Outcome(answers, len(batch) == 1, started, joined, ended, ended, time.thread_time() - cpu)

    def _run_alone(self, item: QueuedItem) -> _Answer:
        try:
            return self._session.run(item.feeds)
        except Exception as error:
            return error

    def settle(self, batch: list[QueuedItem], outcome: _Outcome) -> None:
        """Hands the outcome to the callers."""
        rows = sum(item.rows for item in batch)
        self._recent_seconds += 0.2 * (outcome.seconds - self._recent_seconds)
        self._recent_cpu += 0.2 * (outcome.cpu_seconds - self._recent_cpu)
        calls, enqueued = [item.call for item in batch], [item.enqueued for item in batch]
        self._observer.ran(BatchReport(rows, outcome.started, outcome.seconds, calls, enqueued))
        waited = 0.0
        for item, answer in zip(batch, outcome.answers, strict=True):
            queue_seconds = outcome.started - item.enqueued
            waited += queue_seconds
            if item.abandoned():
                pass  # the caller left while it ran
            elif isinstance(answer, Exception):
                item.fail(answer)
            else:
                size = rows if outcome.together else item.rows
                item.answer(BatchResult(answer, size, queue_seconds, outcome.seconds))
        if outcome.together and not isinstance(outcome.answers[0], Exception):
            self._observer.answered(
                BatchTimes(
                    requests=len(batch),
                    rows=rows,
                    queue_seconds=waited,
                    input_seconds=outcome.joined - outcome.started,
                    infer_seconds=outcome.ran - outcome.joined,
                    output_seconds=outcome.split - outcome.ran,
                )
            )


def _join(batch: list[QueuedItem]) -> Arrays:
    if len(batch) == 1:  # a tensor can lie anywhere in a message, but graphs want whole words
        return {name: array if array.flags.aligned else array.copy() for name, array in batch[0].feeds.items()}
    return {name: np.concatenate([item.feeds[name] for item in batch]) for name in batch[0].feeds}


def _split(outputs: dict[str, Array], batch: list[QueuedItem]) -> Iterator[dict[str, Array]]:
    """Each item's rows, as views; a lonely item gets the outputs as they are, so that they need not have rows."""
    if len(batch) == 1:
        yield outputs
        return
    rows = sum(item.rows for item in batch)
    odd = [name for name, array in outputs.items() if array.shape[:1] != (rows,)]
    if odd:
        raise ValueError(f"the outputs {odd} do not have the {rows} rows of the batch")
    start = 0
    for item in batch:
        stop = start + item.rows
        yield {name: array[start:stop] for name, array in outputs.items()}
        start = stop
