"""A batcher behind a cache: what was answered before is not run, and what is asked twice at once runs once.

A request that is not in the cache makes a flight, which waits in the queue in its place; whoever asks the same before
it lands joins it. A flight belongs to nobody: it runs as long as one of its requests still waits, whichever came first,
until the last of their deadlines. Errors are given to all who wait and not kept.
"""

from __future__ import annotations

import asyncio
import time

from shared.errors import DeadlinePassed
from shared.serving.batching import AwaitedItem, Batcher, BatchResult, QueuedItem
from shared.serving.calls import current_call
from shared.serving.response_cache import CacheSection, answer_of, digest_of
from shared.serving.session import Arrays


class Flight(QueuedItem):
    """One run for all who ask the same; `requests` are those that still wait, oldest first."""

    __slots__ = ("_batcher", "digest", "lookup_seconds", "requests")

    def __init__(self, batcher: CachedBatcher, digest: bytes, first: QueuedItem, lookup_seconds: float) -> None:
        super().__init__(first.feeds, first.deadline, first.call)
        self._batcher, self.digest, self.lookup_seconds = batcher, digest, lookup_seconds
        self.enqueued = first.enqueued
        self.requests: dict[QueuedItem, None] = {}

    def join(self, request: QueuedItem) -> None:
        """One more waits for it."""
        self.requests[request] = None
        self.deadline = max(self.deadline, request.deadline)

    def leave(self, request: QueuedItem) -> None:
        """One does not wait any more."""
        self.requests.pop(request, None)
        self.deadline = max((other.deadline for other in self.requests), default=self.deadline)

    def abandoned(self) -> bool:
        """Nobody waits any more and it does not run yet; one that ran is worth keeping."""
        return not self.requests and self._batcher.waits(self)

    def answer(self, result: BatchResult) -> None:
        """See QueuedItem."""
        self._batcher.landed(self, result)

    def fail(self, error: Exception) -> None:
        """See QueuedItem."""
        self._batcher.landed(self, error)


class CachedBatcher(Batcher):
    """A batcher with a cache; `section` is set right after it was made."""

    section: CacheSection

    def keep_in(self, section: CacheSection) -> CachedBatcher:
        """Takes answers from `section` and puts them there."""
        self.section = section
        self._flights: dict[bytes, Flight] = {}
        self._flight_of: dict[QueuedItem, Flight] = {}
        return self

    def enter(self, item: QueuedItem) -> None:
        """See Batcher; a request that was answered before is told so at once."""
        self._admitted += 1
        self._ask(item)

    async def submit(self, feeds: Arrays, deadline: float = float("inf")) -> BatchResult:
        """See Batcher."""
        item = AwaitedItem(feeds, deadline, current_call.get())
        self._ask(item)
        try:
            return await item.future
        except asyncio.CancelledError:
            self.withdraw(item)
            raise

    def waits(self, item: QueuedItem) -> bool:
        """Whether it is in the queue."""
        return item in self._queue

    def _ask(self, item: QueuedItem) -> None:
        started = time.perf_counter()
        digest = digest_of(item.feeds)
        known = self.section.find(digest)
        if known is not None:
            seconds = time.perf_counter() - started
            self._observer.cached(item.call, "hit", known.batch_size, seconds, 0.0)
            item.answer(BatchResult(known.outputs, known.batch_size, 0.0, 0.0, cached=True))
            return
        flight = self._flights.get(digest)
        if flight is None:
            flight = self._flights[digest] = Flight(self, digest, item, time.perf_counter() - started)
            self._queue[flight] = None
            self._pool.schedule(self)
        flight.join(item)
        self._flight_of[item] = flight

    def withdraw(self, item: QueuedItem) -> None:
        """See Batcher; a flight goes on while another of its requests waits."""
        flight = item if isinstance(item, Flight) else self._flight_of.pop(item, None)
        if flight is None:
            return
        flight.leave(item)
        if not flight.requests and self.waits(flight):
            del self._flights[flight.digest]
            super().withdraw(flight)

    def take(self) -> list[QueuedItem]:
        """See Batcher; first those whose own deadline passed leave their flights."""
        now = time.monotonic()
        for flight in self._queue:
            if isinstance(flight, Flight) and len(flight.requests) > 1:
                self._expire(flight, now)
        return super().take()

    def _expire(self, flight: Flight, now: float) -> None:
        late = [request for request in flight.requests if request.deadline <= now]
        for request in late[: len(flight.requests) - 1]:  # with the last one the flight itself is too late
            flight.leave(request)
            del self._flight_of[request]
            self._observer.dropped("deadline")
            if not request.abandoned():
                request.fail(DeadlinePassed("the deadline passed while the request waited in the queue"))

    def landed(self, flight: Flight, outcome: BatchResult | Exception) -> None:
        """A flight ran, or failed: tells all who wait for it, and keeps the answer."""
        self._flights.pop(flight.digest, None)
        waiting = list(flight.requests)
        flight.requests.clear()
        for request in waiting:
            self._flight_of.pop(request, None)
        if isinstance(outcome, Exception):
            for request in waiting:
                if not request.abandoned():
                    request.fail(outcome)
            return
        started = time.perf_counter()
        answer = answer_of(outcome.outputs, outcome.batch_size)
        self.section.store(flight.digest, answer)
        self._observer.missed(flight.lookup_seconds + time.perf_counter() - started)
        run_started = flight.enqueued + outcome.queue_seconds
        shared = BatchResult(answer.outputs, outcome.batch_size, 0.0, outcome.infer_seconds, cached=True)
        for number, request in enumerate(waiting):
            if request.abandoned():
                continue
            if number == 0:
                request.answer(outcome)
                continue
            waited = max(0.0, run_started - request.enqueued)
            self._observer.cached(request.call, "shared", outcome.batch_size, 0.0, waited)
            request.answer(shared._replace(queue_seconds=waited))
