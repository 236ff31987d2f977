"""Prometheus metrics of a serving process: seconds and bytes, histograms for every stage, labels of bounded number."""

from __future__ import annotations

from dataclasses import dataclass
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from shared.serving.batching import BatchObserver

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64)
MODEL = ("model", "version", "variant")


class Telemetry:
    """All metrics of one serving process, in a registry of its own, so that tests can run several servers at once."""

    def __init__(self, service: str) -> None:
        self.service = service
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "usagi_requests", "Calls answered, by gRPC code.", ("service", "method", "code"), registry=registry
        )
        self.request_seconds = Histogram(
            "usagi_request_duration_seconds",
            "Seconds from the call's arrival to its answer.",
            ("service", "method"),
            buckets=SECONDS,
            registry=registry,
        )
        self.inflight = Gauge("usagi_inflight_requests", "Calls being answered now.", ("service",), registry=registry)
        self.stage_seconds = {
            stage: Histogram(
                f"usagi_inference_{stage}_duration_seconds",
                f"Seconds of the stage {stage}.",
                MODEL,
                buckets=SECONDS,
                registry=registry,
            )
            for stage in ("queue", "preprocess", "infer", "postprocess")
        }
        self.batch_size = Histogram(
            "usagi_batch_size", "Items that ran together.", MODEL, buckets=SIZES, registry=registry
        )
        self.session_runs = Counter("usagi_session_runs", "Runs of a graph.", MODEL, registry=registry)
        self.items = Counter("usagi_items", "Items that ran through a graph.", MODEL, registry=registry)
        self.rejected = Counter("usagi_rejected", "Items refused since the queue was full.", MODEL, registry=registry)
        self.dropped = Counter("usagi_dropped", "Items dropped before they ran.", (*MODEL, "reason"), registry=registry)
        self.queue_depth = Gauge("usagi_queue_depth", "Items that wait now.", MODEL, registry=registry)
        self.model_info = Gauge("usagi_model_info", "1 for every variant in memory.", MODEL, registry=registry)

    def observer(self, model: str, version: str, variant: str) -> ModelObserver:
        """What a model's batcher reports to; the label lookups are done once, here."""
        labels = (model, version, variant)
        return ModelObserver(
            telemetry=self,
            labels=labels,
            queue=self.stage_seconds["queue"].labels(*labels),
            preprocess=self.stage_seconds["preprocess"].labels(*labels),
            infer=self.stage_seconds["infer"].labels(*labels),
            postprocess=self.stage_seconds["postprocess"].labels(*labels),
            batch=self.batch_size.labels(*labels),
            runs=self.session_runs.labels(*labels),
            items=self.items.labels(*labels),
        )

    def forget(self, model: str, version: str, variant: str) -> None:
        """Ends the gauges of a variant that left memory; its counters stay, as counters must."""
        self.model_info.remove(model, version, variant)
        self.queue_depth.remove(model, version, variant)

    def serve(self, host: str, port: int) -> WSGIServer:
        """Serves /metrics on a thread of its own; close with `shutdown()` and `server_close()`."""
        server, _ = start_http_server(port, addr=host, registry=self.registry)
        return server


@dataclass(frozen=True)
class ModelObserver(BatchObserver):
    """Reports one variant's batches to the telemetry."""

    telemetry: Telemetry
    labels: tuple[str, str, str]
    queue: Histogram
    preprocess: Histogram
    infer: Histogram
    postprocess: Histogram
    batch: Histogram
    runs: Counter
    items: Counter

    def rejected(self) -> None:
        """Counts a refusal."""
        self.telemetry.rejected.labels(*self.labels).inc()

    def dropped(self, reason: str) -> None:
        """Counts an item that never ran."""
        self.telemetry.dropped.labels(*self.labels, reason).inc()

    def ran(self, batch_size: int, infer_seconds: float) -> None:
        """Counts a batch."""
        self.runs.inc()
        self.items.inc(batch_size)
        self.batch.observe(batch_size)
        self.infer.observe(infer_seconds)

    def waited(self, queue_seconds: float) -> None:
        """Counts an item's wait."""
        self.queue.observe(queue_seconds)
