"""What every call to the catalog passes: unknown domains and methods are refused, errors become rich statuses.

The services' own interceptor also counts and batches, and so brings ONNX Runtime along; the catalog does neither.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn

import grpc
import grpc.aio

from services.gateway.routes import SERVICE_HEADER
from shared.errors import InvalidInput, NotSupported, UsagiError
from shared.serving.guarded import aborting, guard_handler

DETAILS = "grpc-status-details-bin"
SERVICE = "gateway"

Handler = Any  # grpc.RpcMethodHandler has no usable type


class CatalogInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every call.

    Args:
        domains: the known ones.
    """

    def __init__(self, domains: Sequence[str]) -> None:
        self._domains = tuple(domains)

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Handler]], handler_call_details: Any
    ) -> Handler:
        """The handler of the method, or one that refuses the call."""
        named = dict(handler_call_details.invocation_metadata or ()).get(SERVICE_HEADER)
        if named is not None and named not in self._domains:
            return _refusing(unknown_domain(str(named), self._domains))
        handler = await continuation(handler_call_details)
        if handler is None:
            method = handler_call_details.method
            return _refusing(NotSupported(f"there is no method {method}; gRPC reflection lists those that there are"))
        return guard_handler(handler, _abort)


def unknown_domain(named: str, domains: Sequence[str]) -> InvalidInput:
    """The error for a domain that is not there."""
    return InvalidInput(
        SERVICE_HEADER, f"there is no domain {named!r}; known: {', '.join(domains)}", reason="DOMAIN_NOT_FOUND"
    )


def _refusing(error: UsagiError) -> Handler:
    """A handler that fits every method, since it reads no request."""

    async def refuse(requests: Any, context: Any) -> None:
        await _abort(error, context)

    return grpc.stream_stream_rpc_method_handler(refuse)


_abort_with = aborting(SERVICE)


async def _abort(error: Exception, context: Any) -> NoReturn:
    """As a service does; what a domain said is passed on."""
    if isinstance(error, grpc.aio.AioRpcError):
        await _pass_on(error, context)
    await _abort_with(error, context)


async def _pass_on(error: grpc.aio.AioRpcError, context: Any) -> NoReturn:
    trailers = tuple((key, value) for key, value in error.trailing_metadata() or () if key == DETAILS)
    await context.abort(error.code(), error.details() or "", trailing_metadata=trailers)
    raise AssertionError("abort always raises")
