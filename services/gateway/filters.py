"""The HTTP filters that every call passes, in their order."""

from __future__ import annotations

from typing import Any

from services.gateway.strict import lua_script

Json = dict[str, Any]

ADMIN_METHODS = (
    "/usagi.model.v1.ModelService/LoadModel",
    "/usagi.model.v1.ModelService/UnloadModel",
    "/inference.GRPCInferenceService/RepositoryModelLoad",
    "/inference.GRPCInferenceService/RepositoryModelUnload",
)
FRAME_BYTES = 5
"""gRPC's prefix of every message: one byte of flags, four of length."""


def http_filters(
    *, services: list[str], descriptors: str, cors_origins: str, max_message_bytes: int, max_json_bytes: int
) -> list[Json]:
    """All filters: origin check, gRPC-Web to gRPC, roles, strict JSON, JSON to gRPC, size limit, statistics, router.

    Args:
        services: full names of the services that JSON can call.
        descriptors: the descriptor set, base64.
        cors_origins: regular expression of the web origins that may call.
        max_message_bytes: limit of one message.
        max_json_bytes: limit of one JSON body.
    """
    return [
        _filter("cors", "Cors"),
        _filter("grpc_web", "GrpcWeb"),
        _filter("rbac", "RBAC", rules=_admin_rules(cors_origins)),
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


def _admin_rules(cors_origins: str) -> Json:
    """Denies admin methods to callers from elsewhere, and to foreign web pages that a local browser shows."""
    loopback = [
        {"direct_remote_ip": {"address_prefix": "127.0.0.0", "prefix_len": 8}},
        {"direct_remote_ip": {"address_prefix": "::1", "prefix_len": 128}},
    ]
    elsewhere = {"not_id": {"or_ids": {"ids": loopback}}}
    foreign_page = {
        "and_ids": {
            "ids": [
                {"header": {"name": "origin", "present_match": True}},
                {"not_id": {"header": {"name": "origin", "string_match": {"safe_regex": {"regex": cors_origins}}}}},
            ]
        }
    }
    permissions = [{"url_path": {"path": {"exact": method}}} for method in ADMIN_METHODS]
    return {
        "action": "DENY",
        "policies": {"admin": {"permissions": permissions, "principals": [elsewhere, foreign_page]}},
    }


def _filter(name: str, message: str, **fields: Any) -> Json:
    kind = f"type.googleapis.com/envoy.extensions.filters.http.{name}.v3.{message}"
    return {"name": f"envoy.filters.http.{name}", "typed_config": {"@type": kind, **fields}}
