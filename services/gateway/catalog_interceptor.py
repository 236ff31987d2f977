"""What every call to the catalog passes: unknown domains and methods are refused, errors become rich statuses.

The services' own interceptor also counts and batches, and so brings ONNX Runtime along; the catalog does neither.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn

import grpc
import grpc.aio
from grpc_status import rpc_status

from services.gateway.routes import SERVICE_HEADER
from shared.errors import InvalidInput, NotSupported, UsagiError
from shared.serving.status import to_status

log = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
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
        return _wrap(handler) if handler.unary_unary else handler


def unknown_domain(named: str, domains: Sequence[str]) -> InvalidInput:
    """The error for a domain that is not there."""
    return InvalidInput(
        SERVICE_HEADER, f"there is no domain {named!r}; known: {', '.join(domains)}", reason="DOMAIN_NOT_FOUND"
    )


def request_id(context: Any) -> str:
    """The id that the gateway gave the call."""
    return str(dict(context.invocation_metadata() or ()).get(REQUEST_ID, ""))


def _wrap(handler: Handler) -> Handler:
    async def call(request: Any, context: Any) -> Any:
        try:
            return await handler.unary_unary(request, context)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except grpc.aio.AioRpcError as error:
            await _pass_on(error, context)
        except Exception as error:  # whatever it is, the caller gets a status
            if not isinstance(error, UsagiError):
                log.exception("unexpected error")
            await abort_with(error, context)

    return grpc.unary_unary_rpc_method_handler(call, handler.request_deserializer, handler.response_serializer)


def _refusing(error: UsagiError) -> Handler:
    """A handler that fits every method, since it reads no request."""

    async def refuse(requests: Any, context: Any) -> None:
        await abort_with(error, context)

    return grpc.stream_stream_rpc_method_handler(refuse)


async def abort_with(error: Exception, context: Any) -> NoReturn:
    """Ends a call with the rich status of an error."""
    rich = rpc_status.to_status(to_status(error, SERVICE, request_id(context)))
    await context.abort(rich.code, rich.details, trailing_metadata=rich.trailing_metadata)
    raise AssertionError("abort always raises")


async def _pass_on(error: grpc.aio.AioRpcError, context: Any) -> NoReturn:
    trailers = tuple((key, value) for key, value in error.trailing_metadata() or () if key == DETAILS)
    await context.abort(error.code(), error.details() or "", trailing_metadata=trailers)
    raise AssertionError("abort always raises")
