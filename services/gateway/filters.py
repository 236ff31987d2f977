"""The HTTP filters that every call passes, in their order."""

from __future__ import annotations

from typing import Any

from services.gateway.admission import Keys, admission_filters
from services.gateway.strict import lua_script

Json = dict[str, Any]

FRAME_BYTES = 5
"""gRPC's prefix of every message: one byte of flags, four of length."""


def http_filters(
    *,
    services: list[str],
    descriptors: str,
    cors_origins: str,
    max_message_bytes: int,
    max_json_bytes: int,
    keys: Keys = None,
) -> list[Json]:
    """All filters: origins, gRPC-Web to gRPC, keys, rates, strict JSON, JSON to gRPC, size limit, statistics, router.

    Args:
        services: full names of the services that JSON can call.
        descriptors: the descriptor set, base64.
        cors_origins: regular expression of the web origins that may call.
        max_message_bytes: limit of one message.
        max_json_bytes: limit of one JSON body.
        keys: who may call.
    """
    return [
        _filter("cors", "Cors"),
        _filter("grpc_web", "GrpcWeb"),
        *admission_filters(keys, cors_origins),
        _filter("lua", "Lua", default_source_code={"inline_string": lua_script(services, max_message_bytes)}),
        _filter("grpc_json_transcoder", "GrpcJsonTranscoder", **_transcoder(services, descriptors, max_json_bytes)),
        # after the transcoder, so that it measures the message and not its JSON
        _filter("body_size_limit", "BodySizeLimit", max_request_bytes=max_message_bytes + FRAME_BYTES),
        _filter("grpc_stats", "FilterConfig", stats_for_all_methods=False, enable_upstream_stats=True),
        _filter("router", "Router"),
    ]


def _transcoder(services: list[str], descriptors: str, max_json_bytes: int) -> Json:
    return {
        "proto_descriptor_bin": descriptors,
        "services": services,
        "auto_mapping": True,
        "convert_grpc_status": True,
        "print_options": {"preserve_proto_field_names": True, "always_print_primitive_fields": True},
        "request_validation_options": {
            "reject_unknown_method": True,
            "reject_unknown_query_parameters": True,
            "reject_binding_body_field_collisions": True,
        },
        "max_request_body_size": max_json_bytes,
        "max_response_body_size": max_json_bytes,
    }


def _filter(name: str, message: str, **fields: Any) -> Json:
    kind = f"type.googleapis.com/envoy.extensions.filters.http.{name}.v3.{message}"
    return {"name": f"envoy.filters.http.{name}", "typed_config": {"@type": kind, **fields}}
