"""What pipelines count: the calls of each step, and after which step each item was done."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Counter, Histogram

from shared.serving.telemetry import SECONDS, Telemetry

STEP = ("pipeline", "version", "step")


class PipelineMetrics:
    """The metrics of all pipelines of a process.

    Args:
        telemetry: holds the registry.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        registry = telemetry.registry
        self.calls = Counter(
            "usagi_pipeline_step_calls", "Calls of a pipeline's step.", (*STEP, "code"), registry=registry
        )
        self.seconds = Histogram(
            "usagi_pipeline_step_duration_seconds",
            "Seconds of a pipeline's step, queue included.",
            STEP,
            buckets=SECONDS,
            registry=registry,
        )
        self.items = Counter("usagi_pipeline_step_items", "Items that a pipeline's step ran.", STEP, registry=registry)
        self.exits = Counter("usagi_pipeline_exits", "Items whose last step this was.", STEP, registry=registry)

    def observer(self, pipeline: str, version: str, steps: Iterable[str]) -> list[StepMetrics]:
        """The metrics of each step, their labels looked up once."""
        return [StepMetrics(self, (pipeline, version, step)) for step in steps]

    def forget(self, pipeline: str, version: str) -> None:
        """A version is gone."""
        for metric in (self.calls, self.seconds, self.items, self.exits):
            metric.remove_by_labels({"pipeline": pipeline, "version": version})


class StepMetrics:
    """The metrics of one step."""

    def __init__(self, metrics: PipelineMetrics, labels: tuple[str, str, str]) -> None:
        self._calls, self._labels = metrics.calls, labels
        self._seconds = metrics.seconds.labels(*labels)
        self._items = metrics.items.labels(*labels)
        self.exits = metrics.exits.labels(*labels)

    def called(self, code: str, seconds: float, items: int) -> None:
        """The step ran for `items` items."""
        self._calls.labels(*self._labels, code).inc()
        self._seconds.observe(seconds)
        if code == "OK":
            self._items.inc(items)
