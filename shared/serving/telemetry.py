"""What a serving process tells about itself: Prometheus metrics of every stage, and spans when tracing is on.

Seconds and bytes are the units. Labels are bounded: methods are those that exist, models, versions and variants those
that are loaded, so nothing that a caller sends becomes a label; of variants that left memory the last KEPT_SERIES stay.
docs/observability.md lists every metric.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIServer

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

from shared.serving.calls import CallScope, CallSpan, Metadata, TraceParent
from shared.serving.fast_metrics import adder_of, observer_of
from shared.serving.model_observer import STAGES, ModelObserver, Stage
from shared.serving.statistics import ModelStatistics

if TYPE_CHECKING:
    from shared.serving.tracing import Tracing

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64)
BYTES = (256, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576, 4_194_304, 16_777_216)
MODEL = ("model", "version", "variant")
Labels = tuple[str, str, str]
"""Values of MODEL."""
METHOD = ("service", "method")
KEPT_SERIES = 32
"""Variants out of memory whose counters stay; Prometheus has seen them long before they go."""

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, of no use here


class Telemetry:
    """All metrics and spans of one serving process, in a registry of its own, so that tests can run several at once.

    Args:
        service: the domain.
        tracing: makes spans; None for none.
    """

    def __init__(self, service: str, tracing: Tracing | None = None) -> None:
        self.service = service
        self.tracing = tracing
        self.registry = CollectorRegistry()
        self._statistics: dict[tuple[str, str], ModelStatistics] = {}
        self._retired: dict[Labels, None] = {}  # insertion-ordered: the first went first
        registry = self.registry
        ProcessCollector(registry=registry)
        build = Gauge("usagi_build_info", "1, with what runs here.", ("service", "python"), registry=registry)
        build.labels(service, platform.python_version()).set(1)

        self.requests = Counter("usagi_requests", "Calls answered, by gRPC code.", (*METHOD, "code"), registry=registry)
        self.request_seconds = Histogram(
            "usagi_request_duration_seconds",
            "Seconds from a call's arrival to its answer.",
            METHOD,
            buckets=SECONDS,
            registry=registry,
        )
        self.request_bytes = Histogram(
            "usagi_request_bytes", "Bytes of each message received.", METHOD, buckets=BYTES, registry=registry
        )
        self.response_bytes = Histogram(
            "usagi_response_bytes", "Bytes of each message sent.", METHOD, buckets=BYTES, registry=registry
        )
        self.inflight = Gauge("usagi_inflight_requests", "Calls being answered now.", ("service",), registry=registry)

        self.stage_seconds = Histogram(
            "usagi_stage_duration_seconds",
            "Seconds of one stage of an inference.",
            (*MODEL, "method", "stage"),
            buckets=SECONDS,
            registry=registry,
        )
        self.inference_seconds = Histogram(
            "usagi_inference_duration_seconds",
            "Seconds of an inference, from the choice of the model to its result.",
            (*MODEL, "method"),
            buckets=SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "usagi_batch_size", "Items that ran together.", MODEL, buckets=SIZES, registry=registry
        )
        self.batch_seconds = Histogram(
            "usagi_batch_duration_seconds", "Seconds of a batch.", MODEL, buckets=SECONDS, registry=registry
        )
        self.rejected = Counter(
            "usagi_rejected", "Items refused before they waited.", (*MODEL, "reason"), registry=registry
        )
        self.dropped = Counter(
            "usagi_dropped", "Items dropped while they waited.", (*MODEL, "reason"), registry=registry
        )
        self.cache_requests = Counter(
            "usagi_cache_requests", "Requests by what the response cache did.", (*MODEL, "result"), registry=registry
        )
        self.cache_evictions = Counter(
            "usagi_cache_evictions", "Answers that made room for others.", MODEL, registry=registry
        )
        self.cache_bytes = Gauge("usagi_cache_bytes", "Bytes of the answers kept.", MODEL, registry=registry)
        self._kept = (
            *(self.stage_seconds, self.inference_seconds, self.batch_size, self.batch_seconds),
            *(self.rejected, self.dropped, self.cache_requests, self.cache_evictions),
        )
        self.queue_depth = Gauge("usagi_queue_depth", "Items that wait now.", MODEL, registry=registry)
        self.version_seconds = Histogram(
            "usagi_version_duration_seconds",
            "Seconds of the calls that a canary routed; traffic is live, or shadow for copies of calls.",
            ("model", "version", "traffic", "code"),
            buckets=SECONDS,
            registry=registry,
        )
        self.shadow_dropped = Counter(
            "usagi_shadow_dropped",
            "Copies of calls that were not run.",
            ("model", "version", "reason"),
            registry=registry,
        )
        self.model_info = Gauge("usagi_model_info", "1 for every variant in memory.", MODEL, registry=registry)
        self.model_bytes = Gauge(
            "usagi_model_bytes", "Bytes of the weights of a variant in memory.", MODEL, registry=registry
        )
        self.load_seconds = Gauge(
            "usagi_model_load_seconds", "Seconds that loading and warming a variant took.", MODEL, registry=registry
        )
        self._gauges = (self.queue_depth, self.model_info, self.model_bytes, self.load_seconds)
        self.load_failures = Counter(
            "usagi_model_load_failures", "Loads that failed.", ("service",), registry=registry
        ).labels(service)

        self._memory = Gauge(
            "usagi_model_memory_bytes", "Estimated bytes of all sessions.", ("service",), registry=registry
        ).labels(service)
        self._memory_limit = Gauge(
            "usagi_model_memory_limit_bytes", "What they may hold; 0 for no limit.", ("service",), registry=registry
        ).labels(service)
        self.evicted = Counter(
            "usagi_model_evictions", "Variants closed to make room.", ("service",), registry=registry
        ).labels(service)

    def memory(self, total: Callable[[], int], limit: int) -> None:
        """Reads the sessions' memory from `total` whenever it is asked for; both in bytes."""
        self._memory.set_function(total)
        self._memory_limit.set(limit)

    def method(self, name: str) -> MethodObserver:
        """What the calls of a method report to; the label lookups are done once, here."""
        return MethodObserver(self, name)

    def observer(self, model: str, version: str, variant: str) -> ModelObserver:
        """What a variant's batcher and predictor report to; the label lookups are done once, here."""
        labels = (model, version, variant)
        self._retired.pop(labels, None)

        def stage(name: str) -> Stage:
            return Stage(name, labels, lambda method: self.stage_seconds.labels(*labels, method, name))

        return ModelObserver(
            labels=labels,
            tracing=self.tracing,
            stages={name: stage(name) for name in STAGES},
            whole=Stage("", labels, lambda method: self.inference_seconds.labels(*labels, method)),
            batch_size=self.batch_size.labels(*labels),
            batch_seconds=self.batch_seconds.labels(*labels),
            rejected=self.rejected,
            dropped=self.dropped,
            cache_requests=self.cache_requests,
            cache_evictions=self.cache_evictions,
            statistics=self.statistics(model, version),
        )

    def statistics(self, model: str, version: str) -> ModelStatistics:
        """What a version's requests took, all variants together, since the process began."""
        return self._statistics.setdefault((model, version), ModelStatistics())

    def loaded(self, labels: Labels, *, seconds: float, size_bytes: int, depth: Callable[[], int]) -> None:
        """A variant is in memory.

        Args:
            labels: model, version, variant.
            seconds: what loading and warming took.
            size_bytes: of its weights.
            depth: gives the items that wait for it.
        """
        self.model_info.labels(*labels).set(1)
        self.model_bytes.labels(*labels).set(size_bytes)
        self.load_seconds.labels(*labels).set(seconds)
        self.queue_depth.labels(*labels).set_function(depth)

    def caching(self, labels: Labels, size: Callable[[], int]) -> None:
        """A variant has a response cache; `size` gives the bytes of its answers."""
        self.cache_bytes.labels(*labels).set_function(size)

    def uncache(self, labels: Labels) -> None:
        """A variant has no response cache any more, if it ever had."""
        self.cache_bytes.remove_by_labels(dict(zip(MODEL, labels, strict=True)))

    def forget(self, model: str, version: str, variant: str) -> None:
        """A variant left memory: its gauges end now, its counters after KEPT_SERIES others have gone too."""
        for gauge in self._gauges:
            gauge.remove(model, version, variant)
        self.uncache((model, version, variant))
        self._retired[(model, version, variant)] = None
        while len(self._retired) > KEPT_SERIES:
            oldest = next(iter(self._retired))
            del self._retired[oldest]
            for metric in self._kept:
                metric.remove_by_labels(dict(zip(MODEL, oldest, strict=True)))

    def serve(self, host: str, port: int) -> WSGIServer:
        """Serves /metrics on a thread of its own; close with `shutdown()` and `server_close()`."""
        server, _ = start_http_server(port, addr=host, registry=self.registry)
        return server

    def close(self) -> None:
        """Sends the spans that wait."""
        if self.tracing is not None:
            self.tracing.close()


class MethodObserver:
    """The metrics of one method of the server. `begin` is all that a front needs to call when a call arrives."""

    def __init__(self, telemetry: Telemetry, method: str) -> None:
        self.service, self.method = telemetry.service, method
        labels = (telemetry.service, method)
        self._tracing = telemetry.tracing
        self._inflight = adder_of(telemetry.inflight.labels(telemetry.service))
        self._seconds = observer_of(telemetry.request_seconds.labels(*labels))
        self._requests = telemetry.requests
        self._counters: dict[str, Callable[[float], None]] = {}
        self.received = observer_of(telemetry.request_bytes.labels(*labels))
        self.sent = observer_of(telemetry.response_bytes.labels(*labels))

    def begin(self, metadata: Metadata) -> CallScope:
        """A call arrived; `metadata` is what came with it."""
        self._inflight(1)
        return CallScope(self, metadata)

    def start_span(self, parent: TraceParent | None, request_id: str) -> CallSpan | None:
        """The span of a call; None if it is not traced."""
        return self._tracing.start_call(self.method, parent, request_id) if self._tracing is not None else None

    def ended(self, code: str, seconds: float, *, counted: bool = True) -> None:
        """A call was answered; copies of calls are not counted here."""
        self._inflight(-1)
        if not counted:
            return
        counter = self._counters.get(code)
        if counter is None:
            counter = self._counters[code] = adder_of(self._requests.labels(self.service, self.method, code))
        counter(1)
        self._seconds(seconds)
