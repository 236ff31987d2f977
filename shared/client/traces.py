"""A small receiver of OpenTelemetry spans (OTLP over gRPC): `usagi traces` prints each trace as a tree.

For a look on one machine, and for tests; a Collector, Jaeger or Tempo keeps traces.
"""

from __future__ import annotations

import argparse
import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc

from shared.errors import ConfigurationError

DEFAULT_LISTEN = "127.0.0.1:4317"
QUIET_SECONDS = 2.5
"""A trace is printed when no span of it has come for so long; gateway and services send every second."""


@dataclass(frozen=True)
class ReceivedSpan:
    """A finished span. Ids in hex, empty `parent` for a root; times in nanoseconds since 1970.

    `links` are pairs of trace id and span id.
    """

    service: str
    name: str
    trace: str
    span: str
    parent: str
    start: int
    end: int
    attributes: dict[str, Any]
    links: tuple[tuple[str, str], ...]


class TraceReceiver:
    """An OTLP/gRPC server on `address`, which keeps the spans that it gets; `host:0` picks a free port.

    Raises:
        ConfigurationError: the port is taken.
    """

    def __init__(self, address: str = "127.0.0.1:0") -> None:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc

        receiver = self

        class Servicer(pb_grpc.TraceServiceServicer):
            def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
                return receiver._take(request)

        self._spans: list[ReceivedSpan] = []
        self._arrived = threading.Condition()
        self._server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_TraceServiceServicer_to_server(Servicer(), self._server)  # type: ignore[no-untyped-call]
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigurationError(f"cannot listen on {address}: is another receiver there?") from error
        self.endpoint = f"http://{address.rpartition(':')[0]}:{port}"

    def __enter__(self) -> TraceReceiver:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0.2).wait()

    def _take(self, request: Any) -> Any:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb

        with self._arrived:
            self._spans += list(_read(request))
            self._arrived.notify_all()
        return pb.ExportTraceServiceResponse()

    def spans(self) -> list[ReceivedSpan]:
        """All spans so far."""
        with self._arrived:
            return list(self._spans)

    def wait_for(self, condition: Any, seconds: float) -> list[ReceivedSpan]:
        """The spans as soon as `condition(spans)` holds.

        Raises:
            TimeoutError: it does not hold after `seconds`.
        """
        with self._arrived:
            if not self._arrived.wait_for(lambda: condition(self._spans), seconds):
                names = [f"{span.service}:{span.name}" for span in self._spans]
                raise TimeoutError(f"not the spans that were expected within {seconds} s: {names[-50:]}")
            return list(self._spans)


def _read(request: Any) -> Iterator[ReceivedSpan]:
    for resource in request.resource_spans:
        service = _attributes(resource.resource.attributes).get("service.name", "")
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield ReceivedSpan(
                    service=str(service),
                    name=span.name,
                    trace=span.trace_id.hex(),
                    span=span.span_id.hex(),
                    parent=span.parent_span_id.hex(),
                    start=span.start_time_unix_nano,
                    end=span.end_time_unix_nano,
                    attributes=_attributes(span.attributes),
                    links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
                )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value") for pair in pairs}


def draw(spans: list[ReceivedSpan], width: int = 40) -> str:
    """One trace as text: a line a span, children below their parent, with a bar for its time."""
    known = {span.span for span in spans}
    begin, end = min(span.start for span in spans), max(span.end for span in spans)
    scale = width / max(1, end - begin)
    lines = [f"trace {spans[0].trace}  {(end - begin) / 1e6:.2f} ms"]

    def visit(parent: str | None, depth: int) -> None:
        children = [span for span in spans if (span.parent if span.parent in known else None) == parent]
        for span in sorted(children, key=lambda each: (each.start, -each.end)):
            left, length = round((span.start - begin) * scale), max(1, round((span.end - span.start) * scale))
            bar = f"{' ' * min(left, width - 1)}{'█' * length}"[:width].ljust(width)
            text = f"{'  ' * depth}{span.service.removeprefix('usagi-')} {span.name}"
            links = f"  linked to {len(span.links)}" if span.links else ""
            lines.append(f"{bar} {(span.end - span.start) / 1e6:9.2f} ms  {text}{links}")
            visit(span.span, depth + 1)

    visit(None, 0)
    return "\n".join(lines)


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `usagi traces`."""
    parser = commands.add_parser("traces", help="receive OpenTelemetry spans and print each trace")
    parser.add_argument("--listen", default=DEFAULT_LISTEN, help="host:port for OTLP over gRPC (default: %(default)s)")
    parser.add_argument("--count", type=int, default=0, help="end after so many traces (default: never)")
    parser.set_defaults(command=_traces)


def _traces(options: argparse.Namespace) -> int:
    printed: set[str] = set()
    with TraceReceiver(options.listen) as receiver, contextlib.suppress(KeyboardInterrupt):
        seen: dict[str, tuple[int, float]] = {}
        while not options.count or len(printed) < options.count:
            time.sleep(0.2)
            traces: dict[str, list[ReceivedSpan]] = {}
            for span in receiver.spans():
                traces.setdefault(span.trace, []).append(span)
            for trace, spans in traces.items():
                size, since = seen.get(trace, (0, 0.0))
                if len(spans) != size:
                    seen[trace] = (len(spans), time.monotonic())
                elif trace not in printed and time.monotonic() - since > QUIET_SECONDS:
                    print(draw(spans), flush=True)
                    printed.add(trace)
    return 0
