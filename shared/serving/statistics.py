"""Cumulative statistics of a model version, as Triton's ModelStatistics counts them: whole nanoseconds, never reset.

Prometheus has the histograms; these are the sums that Triton's clients read. All calls come from the event loop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from shared.serving.batching import BatchTimes


@dataclass
class Duration:
    """How often something happened, and the nanoseconds of it all."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float, count: int = 1) -> None:
        """Adds `count` events that took `seconds` together."""
        self.count += count
        self.ns += round(seconds * 1e9)


@dataclass
class ComputeDurations:
    """The stages of a run: joining inputs, the graph, splitting outputs."""

    input: Duration = field(default_factory=Duration)
    infer: Duration = field(default_factory=Duration)
    output: Duration = field(default_factory=Duration)

    def add(self, times: BatchTimes, count: int) -> None:
        """Adds a run, `count` times over."""
        self.input.add(times.input_seconds * count, count)
        self.infer.add(times.infer_seconds * count, count)
        self.output.add(times.output_seconds * count, count)


@dataclass
class ModelStatistics:
    """The sums of one version.

    `inferences` counts rows and `executions` runs, so their ratio is the mean batch. `compute` counts each request
    with its whole batch's time, `by_batch_size` each run once. What the cache answered is in `success`, `queue` and
    `cache_hit` alone; `cache_miss` has the runs whose answer was looked for and kept.
    """

    inferences: int = 0
    executions: int = 0
    last_inference_ms: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute: ComputeDurations = field(default_factory=ComputeDurations)
    cache_hit: Duration = field(default_factory=Duration)
    cache_miss: Duration = field(default_factory=Duration)
    by_batch_size: dict[int, ComputeDurations] = field(default_factory=dict)

    def add_batch(self, times: BatchTimes) -> None:
        """Counts one run."""
        self.inferences += times.rows
        self.executions += 1
        self.last_inference_ms = time.time_ns() // 1_000_000
        self.queue.add(times.queue_seconds, times.requests)
        self.compute.add(times, times.requests)
        durations = self.by_batch_size.get(times.rows)
        if durations is None:
            durations = self.by_batch_size[times.rows] = ComputeDurations()
        durations.add(times, 1)

    def add_cached(self, lookup_seconds: float, queue_seconds: float) -> None:
        """Counts a request that another one's run answered."""
        self.last_inference_ms = time.time_ns() // 1_000_000
        self.cache_hit.add(lookup_seconds)
        self.queue.add(queue_seconds)
