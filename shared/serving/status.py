"""From the error tree to google.rpc.Status: the one place where errors become what the caller sees.

ErrorInfo is always there; BadRequest, ResourceInfo, RetryInfo where they apply. What is not a UsagiError becomes
INTERNAL without any of its text: the log has the traceback, the caller gets the request id.

A status travels in headers, of which most gRPC clients take 8 KB and Envoy 60 KB, and what a caller sent stands in it
more than once, so long texts lose their middle.
"""

from __future__ import annotations

from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from shared.errors import DOMAIN, InvalidInput, ModelNotFound, Overloaded, UsagiError

INTERNAL_MESSAGE = "internal error; the server's log has the details under this request id"
PUSHBACK_TRAILER = "grpc-retry-pushback-ms"
MAX_MESSAGE_BYTES = 800
"""Of UTF-8; percent-encoding may make three of each, and the details carry the message once more, as base64."""
MAX_VALUE_BYTES = 256
"""Of UTF-8, of each value in the details."""


def to_status(error: BaseException, service: str, request_id: str = "") -> status_pb2.Status:
    """The rich status of an error.

    Args:
        error: any exception; only a UsagiError shows its message.
        service: domain of the answering service, such as `vision`; it prefixes ErrorInfo.domain.
        request_id: joins the answer with the log.
    """
    known = error if isinstance(error, UsagiError) else None
    metadata = {key: shortened(value, MAX_VALUE_BYTES) for key, value in known.metadata.items()} if known else {}
    if request_id:
        metadata["request_id"] = request_id
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=known.reason if known else "INTERNAL", domain=f"{service}.{DOMAIN}", metadata=metadata
        )
    ]
    if isinstance(error, InvalidInput):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=shortened(error.field, MAX_VALUE_BYTES), description=shortened(error.description, MAX_MESSAGE_BYTES)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, ModelNotFound):
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type=error.field, resource_name=shortened(error.name, MAX_VALUE_BYTES)
            )
        )
    if isinstance(error, Overloaded):
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(
        code=code_pb2.Code.Value(known.code) if known else code_pb2.INTERNAL,
        message=shortened(known.message, MAX_MESSAGE_BYTES) if known else INTERNAL_MESSAGE,
        details=[_pack(detail) for detail in details],
    )


def shortened(text: str, most: int) -> str:
    """The text, or its beginning and end where it has more than `most` bytes as UTF-8."""
    if len(text) <= most // 4:  # the common case: no character has more than four bytes
        return text
    data = text.encode("utf-8", "replace")
    if len(data) <= most:
        return text
    half = (most - 32) // 2
    head, tail = data[:half].decode("utf-8", "ignore"), data[-half:].decode("utf-8", "ignore")
    return f"{head} ({len(data) - 2 * half} bytes left out) {tail}"


def _pack(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def trailers_of(error: BaseException) -> tuple[tuple[str, str], ...]:
    """Extra trailing metadata of an error: the retry pushback that gRPC clients obey by themselves."""
    if isinstance(error, Overloaded):
        return ((PUSHBACK_TRAILER, str(int(error.retry_after * 1000))),)
    return ()
