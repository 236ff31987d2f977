"""What one variant in memory tells: the stages of its inferences and its batches, as metrics and as spans."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Histogram

from shared.serving.batching import BatchObserver, BatchReport, BatchTimes
from shared.serving.calls import CallScope, current_call
from shared.serving.fast_metrics import observer_of
from shared.serving.statistics import ModelStatistics

if TYPE_CHECKING:
    from shared.serving.tracing import Tracing

STAGES = ("queue", "preprocess", "infer", "postprocess")


class Stage:
    """A stage of one variant: a histogram for each method that uses it, and a span in the calls that are traced.

    Args:
        name: of the span; empty for none.
        labels: model, version, variant.
        child: gives the histogram of a method; asked once for each.
    """

    def __init__(self, name: str, labels: tuple[str, str, str], child: Callable[[str], Histogram]) -> None:
        self._name = name
        self._attributes = attributes(labels)
        self._child = child
        self._methods: dict[str, Callable[[float], None]] = {}

    def observe(self, seconds: float) -> None:
        """The stage of the current call ended just now."""
        call = current_call.get()
        self.count(call, seconds)
        if call is not None and call.span is not None and self._name:
            call.span.stage(self._name, time.perf_counter() - seconds, seconds, self._attributes)

    def count(self, call: CallScope | None, seconds: float) -> None:
        """The metric alone; without a call, as in a test of the engine, the label `method` is empty."""
        method = "" if call is None else call.method
        observe = self._methods.get(method)
        if observe is None:
            observe = self._methods[method] = observer_of(self._child(method))
        observe(seconds)


class ModelObserver(BatchObserver):
    """Reports one variant.

    Attributes:
        labels: model, version, variant.
        preprocess: the stage; predictors call its `observe` with seconds.
        postprocess: likewise.
        whole: the whole inference.
        statistics: of the version, all variants together.
    """

    def __init__(
        self,
        *,
        labels: tuple[str, str, str],
        tracing: Tracing | None,
        stages: Mapping[str, Stage],
        whole: Stage,
        batch_size: Histogram,
        batch_seconds: Histogram,
        rejected: Counter,
        dropped: Counter,
        cache_requests: Counter,
        cache_evictions: Counter,
        statistics: ModelStatistics,
    ) -> None:
        self.labels = labels
        self.preprocess, self.postprocess, self.whole = stages["preprocess"], stages["postprocess"], whole
        self._queue, self._infer = stages["queue"], stages["infer"]
        self._tracing = tracing
        self._attributes = attributes(labels)
        self._names = dict(zip(("model", "version", "variant"), labels, strict=True))
        self._batch_size, self._batch_seconds = observer_of(batch_size), observer_of(batch_seconds)
        self._rejected, self._dropped = rejected, dropped
        self._cache_requests, self._cache_evictions = cache_requests, cache_evictions
        self.statistics = statistics

    @contextmanager
    def request(self) -> Iterator[None]:
        """Measures one request from the choice of the model to its result."""
        started = time.perf_counter()
        try:
            yield
        except BaseException:
            self.request_failed(time.perf_counter() - started)
            raise
        self.request_done(current_call.get(), time.perf_counter() - started)

    def request_done(self, call: CallScope | None, seconds: float) -> None:
        """A request was answered."""
        self.statistics.success.add(seconds)
        self.whole.count(call, seconds)

    def request_failed(self, seconds: float) -> None:
        """A request got no result."""
        self.statistics.fail.add(seconds)

    def rejected(self, reason: str) -> None:
        """Counts a refusal."""
        self._rejected.labels(*self.labels, reason).inc()

    def dropped(self, reason: str) -> None:
        """Counts an item that never ran."""
        self._dropped.labels(*self.labels, reason).inc()

    def ran(self, report: BatchReport) -> None:
        """Counts a batch and its items, and makes their spans."""
        self._batch_size(report.rows)
        self._batch_seconds(report.seconds)
        answered_by = {**self._names, "batch": report.rows}
        for call, enqueued in zip(report.calls, report.enqueued, strict=True):
            self._queue.count(call, report.started - enqueued)
            self._infer.count(call, report.seconds)
            if call is not None:
                call.answered_by = answered_by
        if self._tracing is not None:
            self._trace(self._tracing, report)

    def answered(self, times: BatchTimes) -> None:
        """Adds a batch to the version's statistics."""
        self.statistics.add_batch(times)

    def cached(
        self, call: CallScope | None, kind: str, batch_size: int, lookup_seconds: float, queue_seconds: float
    ) -> None:
        """Counts a request that the cache answered."""
        self._cache_requests.labels(*self.labels, kind).inc()
        self.statistics.add_cached(lookup_seconds, queue_seconds)
        self._queue.count(call, queue_seconds)
        if call is not None:
            call.answered_by = {**self._names, "batch": batch_size, "cached": True}
            if call.span is not None:
                waited = lookup_seconds + queue_seconds
                call.span.stage("cache", time.perf_counter() - waited, waited, self._attributes)

    def missed(self, seconds: float) -> None:
        """Counts a run of a request that the cache did not know."""
        self._cache_requests.labels(*self.labels, "miss").inc()
        self.statistics.cache_miss.add(seconds)

    def forgotten(self) -> None:
        """Counts an answer that made room for another."""
        self._cache_evictions.labels(*self.labels).inc()

    def _trace(self, tracing: Tracing, report: BatchReport) -> None:
        spans = [None if call is None else call.span for call in report.calls]
        batch_attributes = {**self._attributes, "usagi.batch_size": report.rows, "usagi.requests": len(spans)}
        batch = tracing.batch(spans, report.started, report.seconds, batch_attributes)
        for span, enqueued in zip(spans, report.enqueued, strict=True):
            if span is not None:
                span.stage("queue", enqueued, report.started - enqueued, self._attributes)
                span.stage("infer", report.started, report.seconds, self._attributes, batch)


def attributes(labels: tuple[str, str, str]) -> dict[str, Any]:
    """The span attributes of model, version, variant."""
    return dict(zip(("usagi.model", "usagi.version", "usagi.variant"), labels, strict=True))
