"""OpenTelemetry spans of a serving process: a server span for each call, its stages as children, one span a batch.

A batch belongs to several calls, so its span is linked to all of theirs, and the stage `infer` of each is linked back
to it. Its parent is the oldest of them, so that the trace of a call that ran alone shows its batch.

Spans of stages are made when the stage is over, from its measured times, so a call that is not sampled pays for the
decision only. Imported when tracing is on, and only then: the SDK costs memory and start-up time.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider, sampling
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

from shared.serving.calls import CallSpan, TraceParent
from shared.trace_settings import TraceSettings

SCOPE = "usagi.serving"
SERVER_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""Codes with which a server span is an error, as OpenTelemetry's conventions for gRPC say."""
EXPORT_SECONDS = 3.0
"""How long one export may take with its retries; also what a dead receiver can add to the end of the process."""
_NANOSECONDS = 1_000_000_000
_EMPTY = otel_context.Context()


class Tracing:
    """Makes the spans of one process and sends them in the background.

    Args:
        service: the domain; spans are of `usagi-<service>`, unless OTEL_SERVICE_NAME says otherwise.
        replica: name of this process.
        settings: where spans go, and how many.
        exporter: takes them instead; for tests.
    """

    def __init__(
        self, service: str, replica: str, settings: TraceSettings, exporter: SpanExporter | None = None
    ) -> None:
        name = os.environ.get("OTEL_SERVICE_NAME") or f"usagi-{service}"
        resource = Resource.create({"service.name": name, "service.namespace": "usagi", "service.instance.id": replica})
        self._provider = TracerProvider(sampler(settings), resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter or _exporter(settings), schedule_delay_millis=settings.delay_ms)
        )
        self._tracer = self._provider.get_tracer(SCOPE)
        self._parent_decides = settings.parent_decides

    def start_call(self, method: str, parent: TraceParent | None, request_id: str) -> ServerSpan | None:
        """The server span of a call; None when it is not sampled.

        Args:
            method: `/package.Service/Method`.
            parent: the caller's place in its trace.
            request_id: joins the span with the logs.
        """
        remote = _remote_context(parent)
        if self._parent_decides and parent is not None and not parent.sampled:
            otel_context.attach(remote)
            return None
        service, _, name = method.strip("/").rpartition("/")
        attributes = {
            "rpc.system": "grpc",
            "rpc.service": service,
            "rpc.method": name,
            "usagi.request_id": request_id,
        }
        span = self._tracer.start_span(method.strip("/"), remote, kind=trace.SpanKind.SERVER, attributes=attributes)
        # what this call asks of other services carries the trace on
        otel_context.attach(trace.set_span_in_context(span, _EMPTY))
        return ServerSpan(self._tracer, span) if span.is_recording() else None

    def batch(
        self, calls: Sequence[CallSpan | None], started: float, seconds: float, attributes: dict[str, Any]
    ) -> trace.Span | None:
        """The span of a batch, linked to the calls that are traced; None when none is.

        Args:
            calls: the spans of the calls in the batch, oldest first.
            started: time.perf_counter() when it ran.
            seconds: how long.
            attributes: model, version, variant, batch size.
        """
        traced = list(dict.fromkeys(call.span for call in calls if isinstance(call, ServerSpan)))
        if not traced:
            return None
        links = [trace.Link(span.get_span_context()) for span in traced]
        begin = _epoch(started)
        span = self._tracer.start_span(
            "batch", trace.set_span_in_context(traced[0], _EMPTY), attributes=attributes, links=links, start_time=begin
        )
        span.end(begin + round(seconds * _NANOSECONDS))
        return span

    def close(self) -> None:
        """Sends what waits and ends the thread that sends."""
        self._provider.shutdown()


class ServerSpan:
    """The span of a call that is sampled. `trace_id` has 32 hex digits."""

    __slots__ = ("_tracer", "span", "trace_id")

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer = tracer
        self.span = span
        self.trace_id = f"{span.get_span_context().trace_id:032x}"

    def stage(self, name: str, started: float, seconds: float, attributes: dict[str, Any], batch: Any = None) -> None:
        """Adds a finished child.

        Args:
            name: of the stage.
            started: time.perf_counter() when it began.
            seconds: how long.
            attributes: model, version, variant.
            batch: what Tracing.batch gave, to be linked.
        """
        links = [trace.Link(batch.get_span_context())] if batch is not None else None
        begin = _epoch(started)
        child = self._tracer.start_span(
            name, trace.set_span_in_context(self.span, _EMPTY), attributes=attributes, links=links, start_time=begin
        )
        child.end(begin + round(seconds * _NANOSECONDS))

    @contextlib.contextmanager
    def step(self, name: str, attributes: dict[str, Any]) -> Iterator[None]:
        """A child around a part of the call; what the part asks of other services carries the trace on from it."""
        child = self._tracer.start_span(name, trace.set_span_in_context(self.span, _EMPTY), attributes=attributes)
        token = otel_context.attach(trace.set_span_in_context(child, _EMPTY))
        try:
            yield
        except BaseException as error:
            child.set_status(trace.Status(trace.StatusCode.ERROR, str(error)))
            raise
        finally:
            otel_context.detach(token)
            child.end()

    def end(self, code: str, message: str) -> None:
        """Ends the span with the name of the call's gRPC code; what the caller did wrong is no error of the server."""
        self.span.set_attribute("rpc.response.status_code", code)
        if code in SERVER_FAULTS:
            self.span.set_status(trace.Status(trace.StatusCode.ERROR, message))
        self.span.end()


def sampler(settings: TraceSettings) -> sampling.Sampler:
    """OpenTelemetry's sampler of the settings."""
    root = sampling.TraceIdRatioBased(settings.root_ratio)
    return sampling.ParentBased(root) if settings.parent_decides else root


def _epoch(started: float) -> int:
    """Nanoseconds since 1970 of a time.perf_counter() of the recent past."""
    return time.time_ns() - round((time.perf_counter() - started) * _NANOSECONDS)


def _remote_context(parent: TraceParent | None) -> otel_context.Context:
    if parent is None:
        return _EMPTY
    span_context = trace.SpanContext(
        trace_id=int(parent.trace_id, 16),
        span_id=int(parent.span_id, 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED if parent.sampled else trace.TraceFlags.DEFAULT),
        trace_state=trace.TraceState.from_header([parent.state]) if parent.state else None,
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(span_context), _EMPTY)


def _exporter(settings: TraceSettings) -> SpanExporter:
    scheme = "https" if settings.secure else "http"
    address = f"{scheme}://{settings.host}:{settings.port}"
    timeout = None if "OTEL_EXPORTER_OTLP_TIMEOUT" in os.environ else EXPORT_SECONDS
    return OTLPSpanExporter(
        endpoint=address, insecure=not settings.secure, headers=dict(settings.headers), timeout=timeout
    )
