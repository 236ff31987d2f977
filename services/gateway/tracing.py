"""Envoy's part of a trace: a server span for each call, a client span for its way to the service, sent as OTLP.

Off unless the environment names a receiver; see shared/trace_settings.py.
"""

from __future__ import annotations

from typing import Any

from shared.trace_settings import TraceSettings

OTLP = "otlp"
SERVICE_NAME = "usagi-gateway"
CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
_SAMPLERS = "envoy.extensions.tracers.opentelemetry.samplers.v3"
_MILLION = 1_000_000
FLUSH_SPANS = 256
"""Spans of one thread that are sent at once, however short they have waited."""

Json = dict[str, Any]


def tracing(settings: TraceSettings) -> Json:
    """`tracing` of the connection manager.

    Envoy obeys the sampled flag of a caller's `traceparent` by itself; a sampler is set only where it must not. For
    calls without one it draws lots by the request id: those whose own id is no UUID are never drawn.
    """
    config = {
        "service_name": SERVICE_NAME,
        "grpc_service": {
            "envoy_grpc": {"cluster_name": OTLP},
            "timeout": "5s",
            "initial_metadata": [{"key": key, "value": value} for key, value in settings.headers.items()],
        },
    }
    if not settings.parent_decides:
        config["sampler"] = _sampler(settings)
    percent = 100.0 * settings.root_ratio if settings.parent_decides else 100.0
    return {
        "provider": {
            "name": "envoy.tracers.opentelemetry",
            "typed_config": _typed("envoy.config.trace.v3.OpenTelemetryConfig", **config),
        },
        "random_sampling": {"value": percent},
        "spawn_upstream_span": True,
        "operation": "%REQ(:PATH)%",
        "upstream_operation": "%UPSTREAM_CLUSTER%%REQ(:PATH)%",
    }


def runtime(settings: TraceSettings | None) -> Json:
    """Envoy's `layered_runtime`: spans leave as often as the services' do."""
    delay = settings.delay_ms if settings else TraceSettings.delay_ms
    layer = {"tracing.opentelemetry.flush_interval_ms": delay, "tracing.opentelemetry.min_flush_spans": FLUSH_SPANS}
    return {"layers": [{"name": "tracing", "static_layer": layer}]}


def untraced(route: Json) -> Json:
    """The route for health checks only, whose traces nobody wants."""
    nothing = {"numerator": 0}
    match = {**route["match"], "prefix": "/grpc.health."}
    return {**route, "match": match, "tracing": {"random_sampling": nothing}}


def otlp_cluster(settings: TraceSettings) -> Json:
    """The cluster of the receiver."""
    address = {"socket_address": {"address": settings.host, "port_value": settings.port}}
    kind = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    cluster: Json = {
        "name": OTLP,
        "type": "STRICT_DNS",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": OTLP,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
        "typed_extension_protocol_options": {
            kind: _typed(kind, explicit_http_config={"http2_protocol_options": {}}),
        },
    }
    if settings.secure:
        validation = {"trusted_ca": {"filename": CA_BUNDLE}}
        cluster["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": _typed(
                "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                sni=settings.host,
                auto_sni_san_validation=True,
                common_tls_context={"validation_context": validation},
            ),
        }
    return cluster


def _sampler(settings: TraceSettings) -> Json:
    if settings.root_ratio >= 1.0:
        name, message, fields = "always_on", "AlwaysOnSamplerConfig", {}
    else:
        share = {"numerator": round(settings.root_ratio * _MILLION), "denominator": "MILLION"}
        name, message, fields = "trace_id_ratio_based", "TraceIdRatioBasedSamplerConfig", {"sampling_percentage": share}
    return {
        "name": f"envoy.tracers.opentelemetry.samplers.{name}",
        "typed_config": _typed(f"{_SAMPLERS}.{message}", **fields),
    }


def _typed(name: str, **fields: Any) -> Json:
    return {"@type": f"type.googleapis.com/{name}", **fields}
