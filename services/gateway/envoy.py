"""Renders Envoy's whole configuration, as JSON, from the table of services. README.md says why it is as it is."""

from __future__ import annotations

import base64
from typing import Any

from services.gateway.admission import SPACE, Keys
from services.gateway.config import Address, GatewayConfig
from services.gateway.descriptors import COMMON_SERVICES, REFLECTION, descriptor_set
from services.gateway.filters import http_filters
from services.gateway.local_replies import local_reply_config
from services.gateway.routes import CATALOG, route_config
from services.gateway.tls import filter_chains
from services.gateway.tracing import otlp_cluster, runtime, tracing
from shared.services_table import ServicesTable

Json = dict[str, Any]

LOOPBACK = "127.0.0.1"
ADMIN = "admin"
MAX_CONNECTIONS = 10_000
MAX_REQUESTS = 4096
WINDOW = 1024 * 1024
"""HTTP/2 flow control window of a stream in bytes; what a slow reader may have in flight."""

ACCESS_LOG = {
    "time": "%START_TIME%",
    "service": "gateway",
    "method": "%REQ(:PATH)%",
    "authority": "%REQ(:AUTHORITY)%",
    "upstream": "%UPSTREAM_CLUSTER%",
    "status": "%RESPONSE_CODE%",
    "code": "%GRPC_STATUS(SNAKE_STRING)%",
    "flags": "%RESPONSE_FLAGS%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "ms": "%DURATION%",
    "bytes_in": "%BYTES_RECEIVED%",
    "bytes_out": "%BYTES_SENT%",
    "request_id": "%REQ(X-REQUEST-ID)%",
    "trace_id": "%TRACE_ID%",
    "key": f"%DYNAMIC_METADATA({SPACE}:name)%",  # its name
}


def bootstrap(config: GatewayConfig, table: ServicesTable, keys: Keys = None) -> Json:
    """Envoy's bootstrap: the public listener, the clusters, the admin interface and the connection limit."""
    listeners = [_public_listener(config, table, keys)]
    clusters = [_service_cluster(name, config.addresses[name], _buffer_bytes(table)) for name in table.services]
    clusters.append(_service_cluster(CATALOG, Address(LOOPBACK, config.catalog_port), _buffer_bytes(table)))
    if config.metrics_port:
        listeners.append(_metrics_listener(config))
        clusters.append(_admin_cluster(config))
    if config.traces:
        clusters.append(otlp_cluster(config.traces))
    return {
        "node": {"id": "gateway", "cluster": "usagi"},
        "admin": {"address": _address(Address(LOOPBACK, config.admin_port))},
        "overload_manager": _overload_manager(),
        "layered_runtime": runtime(config.traces),
        "static_resources": {"listeners": listeners, "clusters": clusters},
    }


def transcoded_services(table: ServicesTable) -> list[str]:
    """Services that can be called with JSON."""
    typed_services = [name for service in table.services.values() for name in service.grpc_services]
    return [*typed_services, *COMMON_SERVICES, REFLECTION[0]]


def json_bytes(max_message_bytes: int) -> int:
    """Limit of a JSON body: base64 needs four bytes for three, and the other fields some."""
    return max_message_bytes * 4 // 3 + 64 * 1024


def _buffer_bytes(table: ServicesTable) -> int:
    return json_bytes(table.gateway.max_message_bytes) + 64 * 1024


def _public_listener(config: GatewayConfig, table: ServicesTable, keys: Keys) -> Json:
    return {
        "name": "public",
        "address": _address(Address(config.gateway_host, config.gateway_port)),
        "per_connection_buffer_limit_bytes": _buffer_bytes(table),
        **filter_chains([_network_filter(_connection_manager(config, table, keys))], config.tls_cert, config.tls_key),
    }


def _connection_manager(config: GatewayConfig, table: ServicesTable, keys: Keys) -> Json:
    limit = table.gateway.max_message_bytes
    return {
        **_typed("envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "public",
        "codec_type": "AUTO",
        "http2_protocol_options": {
            "max_concurrent_streams": 1000,
            "initial_stream_window_size": WINDOW,
            "initial_connection_window_size": 16 * WINDOW,
            "connection_keepalive": {"interval": "30s", "timeout": "10s"},
        },
        "use_remote_address": True,
        "generate_request_id": True,
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": True,
        "request_id_extension": {"typed_config": _request_ids()},
        "stream_idle_timeout": "0s",  # the default, 5 minutes, would cut a quiet health Watch
        "request_headers_timeout": "10s",
        "drain_timeout": "1s",
        **({"tracing": tracing(config.traces)} if config.traces else {}),
        "access_log": [_access_log()],
        "local_reply_config": local_reply_config(limit),
        "route_config": route_config(table, config.cors_origins),
        "http_filters": http_filters(
            services=transcoded_services(table),
            descriptors=base64.b64encode(descriptor_set().SerializeToString(deterministic=True)).decode(),
            cors_origins=config.cors_origins,
            max_message_bytes=limit,
            max_json_bytes=json_bytes(limit),
            keys=keys,
        ),
    }


def _request_ids() -> Json:
    """A caller's id stays as it came: Envoy would write its decision on tracing into it."""
    return _typed("envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig", pack_trace_reason=False)


def _access_log() -> Json:
    """One JSON line on stdout for each call that failed; each service logs its own calls.

    The status of a gRPC-Web call lies in its body, unseen; of those only the HTTP errors are logged. Health checks are
    left out: the catalog asks for the health of absent services twice a second.
    """
    http_error = {"comparison": {"op": "GE", "value": {"default_value": 400, "runtime_key": "gateway.log_from_status"}}}
    not_web = {"header": {"name": "x-grpc-web", "present_match": True, "invert_match": True}}
    grpc_error = [{"grpc_status_filter": {"statuses": ["OK"], "exclude": True}}, {"header_filter": not_web}]
    failed = [{"status_code_filter": http_error}, {"and_filter": {"filters": grpc_error}}]
    health = {"header": {"name": ":path", "string_match": {"prefix": "/grpc.health."}, "invert_match": True}}
    both = [{"or_filter": {"filters": failed}}, {"header_filter": health}]
    return {
        "name": "envoy.access_loggers.stdout",
        "filter": {"and_filter": {"filters": both}},
        "typed_config": _typed(
            "envoy.extensions.access_loggers.stream.v3.StdoutAccessLog", log_format={"json_format": ACCESS_LOG}
        ),
    }


def _service_cluster(name: str, address: Address, buffer_bytes: int) -> Json:
    return {
        "name": name,
        "cluster_type": {"name": "envoy.cluster.dns", "typed_config": _every_address_of_the_name()},
        "lb_policy": "LEAST_REQUEST",
        # a connection that a caller spoils, as by giving up many calls, carries only calls of that caller (ADR 7)
        "connection_pool_per_downstream_connection": True,
        "connect_timeout": "1s",
        "per_connection_buffer_limit_bytes": buffer_bytes,
        "load_assignment": _load_assignment(name, address),
        "typed_extension_protocol_options": _http2_upstream(),
        "health_checks": [] if name == CATALOG else [_health_check()],
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "circuit_breakers": {
            "thresholds": [
                {"max_connections": 1024, "max_pending_requests": MAX_REQUESTS, "max_requests": MAX_REQUESTS}
            ]
        },
        "outlier_detection": _outlier_detection(),
    }


def _every_address_of_the_name() -> Json:
    """What was STRICT_DNS: each address is a replica, and a changed answer counts within 2 s, whatever its TTL."""
    return _typed(
        "envoy.extensions.clusters.dns.v3.DnsCluster",
        dns_refresh_rate="2s",
        dns_failure_refresh_rate={"base_interval": "1s", "max_interval": "1s"},
        respect_dns_ttl=False,
        dns_lookup_family="V4_PREFERRED",
        all_addresses_in_single_endpoint=False,
    )


def _http2_upstream() -> Json:
    options = {
        "initial_stream_window_size": WINDOW,
        "initial_connection_window_size": 16 * WINDOW,
        "connection_keepalive": {"interval": "30s", "timeout": "5s"},
    }
    kind = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    return {
        kind: _typed(
            kind,
            explicit_http_config={"http2_protocol_options": options},
            # each caller's connection has its own ones here: what a caller leaves behind must not stay for Envoy's hour
            common_http_protocol_options={"idle_timeout": "5s"},
        )
    }


def _health_check() -> Json:
    return {
        "grpc_health_check": {"service_name": ""},
        "timeout": "1s",
        "interval": "2s",
        "no_traffic_interval": "2s",  # the default, 60 s, would keep a restarted service away for a minute
        "unhealthy_interval": "1s",
        "no_traffic_healthy_interval": "2s",
        "unhealthy_threshold": 2,
        "healthy_threshold": 1,
    }


def _outlier_detection() -> Json:
    """Only what the network says counts: a service's own error codes are answers, not illness."""
    return {
        "split_external_local_origin_errors": True,
        "consecutive_local_origin_failure": 5,
        "enforcing_consecutive_5xx": 0,
        "enforcing_consecutive_gateway_failure": 0,
        "enforcing_success_rate": 0,
        "enforcing_local_origin_success_rate": 0,
        "interval": "2s",
        "base_ejection_time": "2s",
        "max_ejection_percent": 50,
    }


def _metrics_listener(config: GatewayConfig) -> Json:
    """Serves Envoy's statistics to Prometheus, and nothing else of the admin interface."""
    route = {"match": {"path": "/metrics"}, "route": {"cluster": ADMIN, "prefix_rewrite": "/stats/prometheus"}}
    manager = {
        **_typed("envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "metrics",
        "route_config": {"virtual_hosts": [{"name": "metrics", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": _typed("envoy.extensions.filters.http.router.v3.Router"),
            }
        ],
    }
    return {
        "name": "metrics",
        "address": _address(Address(config.gateway_host, config.metrics_port)),
        "filter_chains": [{"filters": [_network_filter(manager)]}],
    }


def _admin_cluster(config: GatewayConfig) -> Json:
    return {"name": ADMIN, "load_assignment": _load_assignment(ADMIN, Address(LOOPBACK, config.admin_port))}


def _overload_manager() -> Json:
    """A limit of downstream connections, without which Envoy warns."""
    monitor = _typed(
        "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
        max_active_downstream_connections=MAX_CONNECTIONS,
    )
    name = "envoy.resource_monitors.global_downstream_max_connections"
    return {"resource_monitors": [{"name": name, "typed_config": monitor}]}


def _load_assignment(name: str, address: Address) -> Json:
    endpoint = {"endpoint": {"address": _address(address)}}
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]}


def _network_filter(manager: Json) -> Json:
    return {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}


def _address(address: Address) -> Json:
    return {"socket_address": {"address": address.host, "port_value": address.port}}


def _typed(name: str, **fields: Any) -> Json:
    return {"@type": f"type.googleapis.com/{name}", **fields}
