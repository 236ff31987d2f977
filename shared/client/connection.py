"""One connection to a gateway or a service: deadlines, retries, message limits and readable errors.

Retries happen in this layer only: UNAVAILABLE, at most 4 attempts with growing pauses, and only for methods whose
proto says NO_SIDE_EFFECTS; a server's pushback is obeyed by gRPC itself.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import grpc
import usagi
from google.protobuf import descriptor_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from shared.errors import ConfigurationError, UsagiError

DEFAULT_TARGET = "127.0.0.1:8080"
DEFAULT_TIMEOUT = 30.0
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
SERVICE_HEADER = "usagi-service"
SYSTEM_CA = "system"
DESCRIPTOR_SET = Path(usagi.__file__).parents[1] / "usagi.binpb"
_T = TypeVar("_T")


class CallFailed(UsagiError):
    """A call that the server, the gateway or the network refused.

    Attributes:
        code: name of the gRPC code, such as `INVALID_ARGUMENT`.
        reason: ErrorInfo's reason, such as `IMAGE_TRUNCATED`; the code's name if there is none.
        fields: the offending fields of the request with what is wrong with each.
        retry_after: suggested delay in seconds; None if the server suggests none.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = code
        self.fields: dict[str, str] = {}
        self.retry_after: float | None = None


class Connection:
    """A channel to `target`, used as a context manager.

    Args:
        target: `host:port` of the gateway, or of one service.
        timeout: default deadline of a call in seconds.
        service: domain for the calls that every service answers (ModelService, health); None asks the catalog.
        key: the API key; None takes the variable USAGI_KEY.
        ca: speaks TLS and trusts this file of certificates (PEM), or with `system` what gRPC trusts by itself; None
            takes the variable USAGI_CA, empty means no TLS.

    Raises:
        ConfigurationError: the file cannot be read.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        service: str | None = None,
        key: str | None = None,
        ca: str | None = None,
    ) -> None:
        self.target = target
        self.timeout = timeout
        self.metadata = (*(((SERVICE_HEADER, service),) if service else ()), *key_metadata(key))
        self.channel = open_channel(target, channel_options(), ca)

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the channel."""
        self.channel.close()

    def call(self, method: Callable[..., _T], request: Any, *, timeout: float | None = None) -> _T:
        """Calls a unary method of a stub with deadline and metadata.

        Raises:
            CallFailed: the call did not end with OK.
        """
        try:
            return method(request, timeout=timeout or self.timeout, metadata=(*self.metadata, *trace_metadata()))
        except grpc.RpcError as error:
            raise to_call_failed(error, self.target) from error

    def stream(
        self, method: Callable[..., Iterator[_T]], requests: Any, *, timeout: float | None = None
    ) -> Iterator[_T]:
        """Calls a streaming method of a stub; raises as `call` does, when the answers are read."""
        try:
            metadata = (*self.metadata, *trace_metadata())
            yield from method(requests, timeout=timeout or self.timeout, metadata=metadata)
        except grpc.RpcError as error:
            raise to_call_failed(error, self.target) from error


def open_channel(target: str, options: list[tuple[str, Any]], ca: str | None = None) -> grpc.Channel:
    """A channel, with TLS if `ca` or the variable USAGI_CA says so; see Connection."""
    ca = os.environ.get("USAGI_CA", "") if ca is None else ca
    if not ca:
        return grpc.insecure_channel(target, options=options)
    try:
        roots = None if ca == SYSTEM_CA else Path(ca).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"no certificates can be read from {ca}: {error.strerror}; see --ca") from error
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(roots), options=options)


def key_metadata(key: str | None = None) -> tuple[tuple[str, str], ...]:
    """The header with an API key; nothing without one. None takes the variable USAGI_KEY."""
    key = os.environ.get("USAGI_KEY", "") if key is None else key
    return (("authorization", f"Bearer {key}"),) if key else ()


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """`traceparent` and its kin if the application has a current span; nothing if it does not use OpenTelemetry."""
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple(carrier.items())


def channel_options() -> list[tuple[str, Any]]:
    """gRPC's options of every client channel of ours."""
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.service_config", json.dumps(service_config())),
    ]


def service_config() -> dict[str, Any]:
    """gRPC's service config: retries for the methods without side effects."""
    return {
        "methodConfig": [
            {
                "name": [{"service": service, "method": method} for service, method in _safe_methods()],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "1s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
        "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
    }


def _safe_methods() -> list[tuple[str, str]]:
    """Service and method of everything that our protos mark NO_SIDE_EFFECTS."""
    files = descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTOR_SET.read_bytes())
    return [
        (f"{file.package}.{service.name}", method.name)
        for file in files.file
        for service in file.service
        for method in service.method
        if method.options.idempotency_level == descriptor_pb2.MethodOptions.NO_SIDE_EFFECTS
    ]


def to_call_failed(error: grpc.RpcError, target: str) -> CallFailed:
    """The readable form of gRPC's error, with the details decoded."""
    code: grpc.StatusCode = error.code()
    message: str = error.details() or code.name
    if code is grpc.StatusCode.UNAVAILABLE and "connect" in message.lower():
        message = f"nothing answers at {target}: {message}; start Usagi with `make local` or `make up`"
    failed = CallFailed(code.name, message)
    status = _rich_status(error)
    for packed in status.details if status else ():
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if packed.Unpack(info):
            failed.reason, failed.metadata = info.reason, dict(info.metadata)
        elif packed.Unpack(bad):
            failed.fields = {violation.field: violation.description for violation in bad.field_violations}
        elif packed.Unpack(retry):
            failed.retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    return failed


def _rich_status(error: grpc.RpcError) -> Any:
    try:
        return rpc_status.from_call(error)
    except ValueError:  # details of another status than the call's own: not ours, so not shown
        return None
