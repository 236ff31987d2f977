"""The call that the current task answers: its ids, its deadline, and what is reported about it.

A server's front makes one CallScope for each call, whatever carries the bytes: `MethodObserver.begin` when it arrives,
`CallScope.finish` when it is answered. A task that answers it calls `enter`, so that everything below finds it in
`current_call`.
"""

from __future__ import annotations

import contextvars
import logging
import random
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from shared.logs import request_id, trace_id
from shared.serving.traffic import SHADOW_HEADER, VERSIONS_HEADER, Traffic, parse_traffic, traffic

access_log = logging.getLogger("usagi.access")

REQUEST_ID = "x-request-id"
TRACE_PARENT = "traceparent"
TRACE_STATE = "tracestate"
PIPELINES_HEADER = "usagi-pipelines"
"""The pipelines that a call came through; see shared/serving/pipelines."""
_READ = frozenset((REQUEST_ID, TRACE_PARENT, TRACE_STATE, VERSIONS_HEADER, SHADOW_HEADER, PIPELINES_HEADER))
MAX_ID = 128
_TRACE_PARENT = re.compile(r"([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")

_NOTHING: Mapping[str, Any] = {}
_ids = random.Random()  # noqa: S311  # names for calls, no secrets

Metadata = Iterable[tuple[str, str | bytes]]

current_call: contextvars.ContextVar[CallScope | None] = contextvars.ContextVar("current_call", default=None)
"""The call that the current task answers; None outside of calls, such as when a model is warmed."""


def deadline_of(context: Any) -> float:
    """time.monotonic() at which the caller's deadline passes; infinity without one."""
    remaining = context.time_remaining()
    return float("inf") if remaining is None else time.monotonic() + float(remaining)


class TraceParent:
    """Where a caller's trace stands: the W3C header `traceparent`, and `tracestate` as it came."""

    __slots__ = ("sampled", "span_id", "state", "trace_id")

    def __init__(self, trace_id: str, span_id: str, sampled: bool, state: str = "") -> None:
        self.trace_id, self.span_id, self.sampled, self.state = trace_id, span_id, sampled, state

    @classmethod
    def parse(cls, header: str, state: str = "") -> TraceParent | None:
        """None for what W3C Trace Context says to ignore: another form, version ff, ids of zeros."""
        match = _TRACE_PARENT.fullmatch(header)
        if match is None or match[1] == "ff" or (match[1] == "00" and match[5]):
            return None
        return cls(match[2], match[3], bool(int(match[4], 16) & 1), state)


class CallSpan(Protocol):
    """The span of a call that is being traced; see shared/serving/tracing.py."""

    trace_id: str

    def stage(self, name: str, started: float, seconds: float, attributes: dict[str, Any], batch: Any = None) -> None:
        """Adds a finished child; `started` is a time.perf_counter(), `batch` the span of the batch that it ran in."""

    def step(self, name: str, attributes: dict[str, Any]) -> AbstractContextManager[None]:
        """A child around a part of the call that asks others: what they are sent continues from here."""

    def end(self, code: str, message: str) -> None:
        """Ends the span with the call's gRPC code."""


class MethodReports(Protocol):
    """What a CallScope reports to; see shared/serving/telemetry.py."""

    method: str

    def start_span(self, parent: TraceParent | None, request_id: str) -> CallSpan | None:
        """The span of a call that is to be traced."""

    def ended(self, code: str, seconds: float, *, counted: bool = True) -> None:
        """A call was answered; copies of calls are not counted here."""


class CallScope:
    """One call from its arrival to its answer.

    Attributes:
        method: full name, `/package.Service/Method`; `unknown` for methods that do not exist, so that no caller can
            make up labels.
        request_id: the caller's or the gateway's, or a new one.
        shadow: the call is a copy whose answer nobody reads (shared/serving/traffic.py).
        span: set while the call is traced.
        headers: those that have a meaning here, as they came.
        started: time.perf_counter() of its arrival.
        answered_by: fields of the access log that the engine adds: model, version, variant, batch.
    """

    __slots__ = (
        *("_reports", "_routed", "_trace_id", "answered_by", "headers", "method"),
        *("request_id", "shadow", "span", "started"),
    )

    def __init__(self, reports: MethodReports, metadata: Metadata) -> None:
        self.started = time.perf_counter()
        self._reports = reports
        self.method = reports.method
        self.answered_by: Mapping[str, Any] = _NOTHING
        self.headers = found = {str(key): str(value) for key, value in metadata if key in _READ}
        self.request_id = found.get(REQUEST_ID, "")[:MAX_ID] or f"{_ids.getrandbits(128):032x}"
        self.shadow = SHADOW_HEADER in found
        self._routed: Traffic | None = None
        for header in (VERSIONS_HEADER, SHADOW_HEADER):
            if header in found:
                self._routed = parse_traffic(header, found[header])
        parent = None
        if TRACE_PARENT in found:
            parent = TraceParent.parse(found[TRACE_PARENT], found.get(TRACE_STATE, ""))
        self.span = reports.start_span(parent, self.request_id)
        self._trace_id = self.span.trace_id if self.span else parent.trace_id if parent else ""

    def enter(self) -> None:
        """The current task answers this call from now on."""
        if self._routed is not None:
            traffic.set(self._routed)
        request_id.set(self.request_id)
        trace_id.set(self._trace_id)
        current_call.set(self)

    @property
    def routed(self) -> bool:
        """Whether a canary has a say in it."""
        return self._routed is not None

    def finish(self, code: str, message: str = "") -> None:
        """Counts, logs and ends the call; `code` is the name of its gRPC code."""
        seconds = time.perf_counter() - self.started
        self._reports.ended(code, seconds, counted=not self.shadow)
        if self.span is not None:
            self.span.end(code, message)
        if access_log.isEnabledFor(logging.INFO):
            fields = {"method": self.method, "code": code, "ms": round(seconds * 1000, 3), **self.answered_by}
            if message:
                fields["error"] = message
            if self.shadow:
                fields["shadow"] = True
            before = request_id.set(self.request_id), trace_id.set(self._trace_id)  # a call need not have its own task
            access_log.info("call", extra=fields)
            request_id.reset(before[0])
            trace_id.reset(before[1])
