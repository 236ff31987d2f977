"""When and where traces go, from OpenTelemetry's own environment variables; the same for the gateway and the services.

Tracing is off unless `OTEL_EXPORTER_OTLP_ENDPOINT` (or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`) names a receiver of
OTLP over gRPC, such as an OpenTelemetry Collector, Jaeger, Tempo or `usagi traces`. What cannot be honoured is an error
at start, never a silent default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from shared.errors import ConfigurationError

SAMPLERS = (
    *("always_on", "always_off", "traceidratio"),
    *("parentbased_always_on", "parentbased_always_off", "parentbased_traceidratio"),
)
DEFAULT_SAMPLER = "parentbased_always_on"
DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class TraceSettings:
    """Where spans are sent, and how many.

    Attributes:
        host: the receiver.
        port: its port.
        secure: whether the connection is TLS (the endpoint's scheme is https).
        sampler: one of SAMPLERS.
        ratio: share of the traces that begin here and are kept, 0 to 1; of `traceidratio` samplers.
        headers: metadata of every export, such as a token.
        delay_ms: spans are sent in batches, this long after the last.
    """

    host: str
    port: int
    secure: bool = False
    sampler: str = DEFAULT_SAMPLER
    ratio: float = 1.0
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_ms: int = 1000

    @property
    def parent_decides(self) -> bool:
        """Whether a caller's own decision, the sampled flag of its `traceparent`, is obeyed."""
        return self.sampler.startswith("parentbased_")

    @property
    def root_ratio(self) -> float:
        """Share of the traces kept that begin here."""
        kind = self.sampler.removeprefix("parentbased_")
        return {"always_on": 1.0, "always_off": 0.0}.get(kind, self.ratio)


def trace_settings(environ: Mapping[str, str] | None = None) -> TraceSettings | None:
    """The settings of this process; None when tracing is off.

    Raises:
        ConfigurationError: values that cannot be used, all in one message.
    """
    environ = os.environ if environ is None else environ
    endpoint = _first(environ, "ENDPOINT")
    switched_off = (
        environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none"
    )
    if not endpoint or switched_off:
        return None
    problems: list[str] = []
    address = urlsplit(endpoint)
    if address.scheme not in DEFAULT_PORTS or not address.hostname:
        problems.append(f"OTEL_EXPORTER_OTLP_ENDPOINT={endpoint!r} is not http://host:port or https://host:port")
    protocol = _first(environ, "PROTOCOL") or "grpc"
    if protocol != "grpc":
        problems.append(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol!r}: only grpc is spoken here")
    sampler = environ.get("OTEL_TRACES_SAMPLER") or DEFAULT_SAMPLER
    if sampler not in SAMPLERS:
        problems.append(f"OTEL_TRACES_SAMPLER={sampler!r} is not one of {', '.join(SAMPLERS)}")
    ratio = _ratio(environ.get("OTEL_TRACES_SAMPLER_ARG") or "1", problems)
    delay = environ.get("OTEL_BSP_SCHEDULE_DELAY") or str(TraceSettings.delay_ms)
    if not delay.isdecimal() or int(delay) == 0:
        problems.append(f"OTEL_BSP_SCHEDULE_DELAY={delay!r} is not a number of milliseconds above 0")
    if problems:
        raise ConfigurationError("; ".join(problems))
    return TraceSettings(
        host=address.hostname or "",
        port=address.port or DEFAULT_PORTS[address.scheme],
        secure=address.scheme == "https",
        sampler=sampler,
        ratio=ratio,
        headers=_headers(_first(environ, "HEADERS")),
        delay_ms=int(delay),
    )


def _first(environ: Mapping[str, str], name: str) -> str:
    """The variable for traces, or else that for all signals."""
    return environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}") or environ.get(f"OTEL_EXPORTER_OTLP_{name}") or ""


def _ratio(text: str, problems: list[str]) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0.0 <= ratio <= 1.0:
        problems.append(f"OTEL_TRACES_SAMPLER_ARG={text!r} is not a share of 0 to 1")
    return ratio


def _headers(text: str) -> dict[str, str]:
    """`key=value,key=value`, values percent-encoded, as W3C Baggage writes them."""
    pairs = (entry.partition("=") for entry in text.split(",") if "=" in entry)
    return {key.strip().lower(): unquote(value.strip()) for key, _, value in pairs}
