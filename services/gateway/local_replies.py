"""What the gateway itself refuses, as google.rpc statuses: in trailers for gRPC and gRPC-Web, as the body for JSON.

Envoy answers a refusal with bare text. Its `local_reply_config` can replace the text and add headers, and keeps a
`grpc-status` that is already there. So each refusal below becomes a mapper for gRPC and one for gRPC-Web, with the
serialised status in `grpc-status-details-bin`, and one for JSON, with the same status as the body.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from services.gateway.admission import SPACE
from shared.errors import DOMAIN
from shared.roles import NEEDS_ADMIN

GATEWAY_DOMAIN = f"gateway.{DOMAIN}"
ORIGINAL_PATH = "x-envoy-original-path"
"""The transcoder sets it on the requests that it turned from JSON into gRPC."""
WEB_TYPE = "application/grpc-web+proto"

Json = dict[str, Any]


@dataclass(frozen=True)
class Refusal:
    """One kind of refusal.

    Attributes:
        code: name of the gRPC code.
        reason: google.rpc.ErrorInfo.reason.
        message: what is wrong and what to do. gRPC callers compare it with the details, so it holds no variable.
        flags: Envoy's response flags that mean it; empty means that `status` decides.
        metadata: what keys.lua calls it; decides if it is set.
        status: Envoy's HTTP status that means it, if there are neither flags nor metadata.
        or_above: every status from `status` on means it.
        http: HTTP status for JSON callers; 0 leaves Envoy's.
        retry_seconds: suggested delay before a retry; 0 means none is suggested.
        quota: names what is used up, for google.rpc.QuotaFailure.
        verbatim: JSON callers see Envoy's own text, which names the place in their request.
    """

    code: str
    reason: str
    message: str
    flags: tuple[str, ...] = ()
    metadata: str = ""
    status: int = 0
    or_above: bool = False
    http: int = 0
    retry_seconds: int = 0
    quota: str = ""
    verbatim: bool = False


def refusals(max_message_bytes: int) -> tuple[Refusal, ...]:
    """All kinds; the first that fits is taken."""
    return (
        too_large(max_message_bytes),
        Refusal(
            "UNAUTHENTICATED",
            "KEY_MISSING",
            "this call needs an API key; send it as the header `authorization: Bearer KEY`",
            metadata="KEY_MISSING",
            http=401,
        ),
        Refusal(
            "UNAUTHENTICATED",
            "KEY_UNKNOWN",
            "this API key is not known here; it may be mistyped or revoked",
            metadata="KEY_UNKNOWN",
            http=401,
        ),
        Refusal(
            "RESOURCE_EXHAUSTED",
            "RATE_EXCEEDED",
            "this API key has no calls left for now; its rate stands in x-ratelimit-limit, come back later",
            status=429,
            http=429,
            retry_seconds=1,
            quota="calls of this API key",
        ),
        Refusal(
            "PERMISSION_DENIED",
            "ADMIN_ONLY",
            NEEDS_ADMIN,
            status=403,
            http=403,
        ),
        Refusal(  # by strict.lua
            "UNIMPLEMENTED",
            "COMPRESSION_NOT_SUPPORTED",
            "compressed messages are not taken, since no limit holds for what they become; send them uncompressed",
            status=415,
            http=415,
        ),
        Refusal(
            "DEADLINE_EXCEEDED",
            "DEADLINE_PASSED",
            "the deadline passed before the service answered",
            status=504,
            http=504,
        ),
        Refusal(
            "UNAVAILABLE",
            "SERVICE_UNAVAILABLE",
            "the service does not answer: it is starting, has stopped or is overloaded; retry in a second",
            flags=("UH", "UF", "UC", "UR", "UO", "LR", "LH", "NC", "OM", "URX", "UPE"),
            http=503,
            retry_seconds=1,
        ),
        Refusal(
            "INVALID_ARGUMENT",
            "INVALID_JSON",
            "the request cannot be turned into a message of this method",
            status=400,
            http=400,
            verbatim=True,
        ),
        Refusal(
            "UNIMPLEMENTED",
            "METHOD_NOT_FOUND",
            "there is no such method; JSON calls are POST /<package>.<Service>/<Method>, and reflection lists them all",
            status=404,
            http=404,
        ),
        Refusal(
            "INTERNAL",
            "GATEWAY_FAILED",
            "the gateway could not answer; its access log has the cause under the request id",
            status=500,
            or_above=True,
        ),
        Refusal(
            "INVALID_ARGUMENT",
            "REQUEST_REFUSED",
            "this is no HTTP request that the gateway takes, such as one with headers over 60 KiB",
            status=400,
            or_above=True,
        ),
    )


def too_large(max_message_bytes: int) -> Refusal:
    """A message over the limit."""
    message = f"the message is over the limit of {max_message_bytes} bytes; send a smaller one"
    return Refusal("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE", message, status=413, http=413)


def local_reply_config(max_message_bytes: int) -> Json:
    """Envoy's `local_reply_config`."""
    kinds = refusals(max_message_bytes)
    return {
        "mappers": [mapper(kind) for mapper in (_web_mapper, _grpc_mapper, _json_mapper) for kind in kinds],
        "body_format": {"text_format_source": {"inline_string": "%LOCAL_REPLY_BODY%"}},
    }


def rich_status(kind: Refusal) -> status_pb2.Status:
    """The status with its details."""
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=kind.reason, domain=GATEWAY_DOMAIN)]
    if kind.retry_seconds:
        details.append(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=kind.retry_seconds)))
    if kind.quota:
        violation = error_details_pb2.QuotaFailure.Violation(subject=kind.quota, description=kind.message)
        details.append(error_details_pb2.QuotaFailure(violations=[violation]))
    return status_pb2.Status(code=_number(kind), message=kind.message, details=[_pack(detail) for detail in details])


def _pack(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _number(kind: Refusal) -> int:
    return int(code_pb2.Code.Value(kind.code))


def _grpc_mapper(kind: Refusal) -> Json:
    encoded = base64.b64encode(rich_status(kind).SerializeToString()).decode()
    return {
        "filter": _all_of(_matches(kind), _from_grpc_caller()),
        "headers_to_add": [_header("grpc-status", str(_number(kind))), _header("grpc-status-details-bin", encoded)],
        "body_format_override": {"text_format_source": {"inline_string": kind.message}},
    }


def _web_mapper(kind: Refusal) -> Json:
    """For gRPC-Web, whose filter would make its own grpc-status of an HTTP status other than 200."""
    mapper = _grpc_mapper(kind)
    headers = [*mapper["headers_to_add"], _header("grpc-message", kind.message), _header("content-type", WEB_TYPE)]
    return {
        "filter": _all_of(_matches(kind), _has_header("x-grpc-web")),
        "status_code": 200,
        "headers_to_add": headers,
        "body_format_override": {"text_format_source": {"inline_string": ""}},
    }


def _json_mapper(kind: Refusal) -> Json:
    message = "%LOCAL_REPLY_BODY%" if kind.verbatim else kind.message
    details: list[Json] = [
        {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": kind.reason, "domain": GATEWAY_DOMAIN}
    ]
    if kind.retry_seconds:
        retry = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{kind.retry_seconds}s"}
        details.append(retry)
    if kind.quota:
        violations = [{"subject": kind.quota, "description": kind.message}]
        details.append({"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": violations})
    mapper: Json = {
        "filter": _matches(kind),
        "body_format_override": {"json_format": {"code": _number(kind), "message": message, "details": details}},
    }
    return {**mapper, "status_code": kind.http} if kind.http else mapper


def _matches(kind: Refusal) -> Json:
    if kind.flags:
        return {"response_flag_filter": {"flags": list(kind.flags)}}
    if kind.metadata:
        said = {"filter": SPACE, "path": [{"key": "refused"}], "value": {"string_match": {"exact": kind.metadata}}}
        return {"metadata_filter": {"matcher": said, "match_if_key_not_found": False}}
    value = {"default_value": kind.status, "runtime_key": f"gateway.refusal.{kind.reason.lower()}"}
    return {"status_code_filter": {"comparison": {"op": "GE" if kind.or_above else "EQ", "value": value}}}


def _from_grpc_caller() -> Json:
    """gRPC or gRPC-Web: by content type, unless the transcoder made it so."""
    grpc_type = {"name": "content-type", "string_match": {"prefix": "application/grpc"}}
    return _all_of({"header_filter": {"header": grpc_type}}, _has_header(ORIGINAL_PATH, invert=True))


def _has_header(name: str, *, invert: bool = False) -> Json:
    return {"header_filter": {"header": {"name": name, "present_match": True, "invert_match": invert}}}


def _all_of(first: Json, second: Json) -> Json:
    return {"and_filter": {"filters": [first, second]}}


def _header(name: str, value: str) -> Json:
    return {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
