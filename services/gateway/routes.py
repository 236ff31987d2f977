"""Which call goes to which cluster, the first that fits.

1. `/usagi.<domain>.v1.*`: the domain, by its path.
2. Header `usagi-service: <domain>`: that domain. An unknown name goes to the catalog, which refuses it and lists all.
3. Authority `<domain>` or `<domain>.*`: that domain.
4. Anything else: the catalog.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from services.gateway.descriptors import client_streaming_methods
from services.gateway.tracing import untraced
from shared.services_table import Service, ServicesTable

CATALOG = "catalog"
STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
SERVICE_HEADER = "usagi-service"
REQUEST_HEADERS = (
    *("content-type", "x-grpc-web", "x-user-agent", "grpc-timeout"),
    *(SERVICE_HEADER, "x-request-id", "traceparent", "authorization"),
)
RESPONSE_HEADERS = (
    *("grpc-status", "grpc-message", "grpc-status-details-bin", "x-request-id", "usagi-unreachable"),
    *("x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"),
)
BODY_SIZE_LIMIT = "envoy.filters.http.body_size_limit"

Json = dict[str, Any]


def route_config(table: ServicesTable, cors_origins: str) -> Json:
    """The one route table: a virtual host for each domain's authority, and one for every other."""
    hosts = [
        _virtual_host(service.name, [service.name, f"{service.name}.*"], service.name, table, cors_origins)
        for service in table.services.values()
    ]
    hosts.append(_virtual_host("any", ["*"], CATALOG, table, cors_origins))
    return {"name": "calls", "ignore_port_in_host_matching": True, "virtual_hosts": hosts}


def _virtual_host(name: str, authorities: list[str], otherwise: str, table: ServicesTable, cors_origins: str) -> Json:
    routes = [route for service in table.services.values() for route in _typed_routes(service)]
    others = [*_header_routes(table.services), _route({"prefix": "/"}, otherwise)]
    routes += [*(_stream_infer(route) for route in others), *(untraced(route) for route in others), *others]
    return {
        "name": name,
        "domains": authorities,
        "routes": routes,
        "typed_per_filter_config": {"envoy.filters.http.cors": _cors_policy(cors_origins)},
    }


def _typed_routes(service: Service) -> list[Json]:
    packages = sorted({name.rpartition(".")[0] for name in service.grpc_services})
    streams = [path for path in client_streaming_methods() if path[1:].rpartition("/")[0] in service.grpc_services]
    return [
        *(_unlimited(_route({"path": path}, service.name)) for path in streams),
        *(_route({"prefix": f"/{package}."}, service.name) for package in packages),
    ]


def _unlimited(route: Json) -> Json:
    """A stream may grow past one message's limit; the service holds each of its messages to it."""
    off = _typed("envoy.config.route.v3.FilterConfig", disabled=True)
    return {**route, "typed_per_filter_config": {BODY_SIZE_LIMIT: off}}


def _stream_infer(route: Json) -> Json:
    """The same route for the one stream of the Open Inference Protocol."""
    match = {key: value for key, value in route["match"].items() if key != "prefix"}
    return _unlimited({**route, "match": {**match, "path": STREAM_INFER}})


def _header_routes(names: Iterable[str]) -> list[Json]:
    known = [
        _route({"prefix": "/", "headers": [{"name": SERVICE_HEADER, "string_match": {"exact": name}}]}, name)
        for name in names
    ]
    unknown = {"prefix": "/", "headers": [{"name": SERVICE_HEADER, "present_match": True}]}
    return [*known, _route(unknown, CATALOG)]


def _route(match: Json, cluster: str) -> Json:
    return {
        "match": match,
        "route": {
            "cluster": cluster,
            "timeout": "0s",  # the default, 15 s, would cut streams; deadlines come from the caller's grpc-timeout
            "max_stream_duration": {"grpc_timeout_header_max": "0s"},
            # a call that never reached the service is repeated once; everything else is the client's to decide
            "retry_policy": {"retry_on": "connect-failure,refused-stream", "num_retries": 1},
        },
    }


def _cors_policy(origins: str) -> Json:
    return _typed(
        "envoy.extensions.filters.http.cors.v3.CorsPolicy",
        allow_origin_string_match=[{"safe_regex": {"regex": origins}}],
        allow_methods="GET, POST, OPTIONS",
        allow_headers=", ".join(REQUEST_HEADERS),
        expose_headers=", ".join(RESPONSE_HEADERS),
        max_age="3600",
    )


def _typed(name: str, **fields: Any) -> Json:
    return {"@type": f"type.googleapis.com/{name}", **fields}
