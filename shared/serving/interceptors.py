"""The one interceptor: request id, error mapping, metrics and the access log of every call of every service.

It wraps each handler once and takes over the parsing of requests, so that bytes that are no message of the method
become INVALID_ARGUMENT instead of gRPC's bare INTERNAL.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from grpc_status import rpc_status

from shared.errors import InvalidInput, NotSupported
from shared.logs import request_id
from shared.serving.status import code_of, to_status, trailers_of
from shared.serving.telemetry import Telemetry

access_log = logging.getLogger("usagi.access")

REQUEST_ID = "x-request-id"
QUIET = ("grpc.health.v1.Health", "grpc.reflection.")
"""Services whose calls are neither logged nor counted."""

Handler = Any  # grpc.RpcMethodHandler has no usable type
Continuation = Callable[[Any], Awaitable[Handler]]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every call.

    Args:
        service: the domain, for logs, metrics and ErrorInfo.
        telemetry: counts the calls.
    """

    def __init__(self, service: str, telemetry: Telemetry) -> None:
        self._service = service
        self._telemetry = telemetry
        self._wrapped: dict[str, Handler] = {}

    async def intercept_service(self, continuation: Continuation, handler_call_details: Any) -> Handler:
        """Returns the wrapped handler of the method, made once."""
        method: str = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return self._wrap("unknown", _unknown_method(method))  # not kept: callers could fill the table
            quiet = method.lstrip("/").startswith(QUIET)
            wrapped = self._wrapped[method] = handler if quiet else self._wrap(method, handler)
        return wrapped

    def _wrap(self, method: str, handler: Handler) -> Handler:
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._streaming(method, handler.stream_stream, _parse_stream, handler.request_deserializer),
                response_serializer=handler.response_serializer,
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._streaming(method, handler.unary_stream, _parse, handler.request_deserializer),
                response_serializer=handler.response_serializer,
            )
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(
                self._unary(method, handler.stream_unary, _parse_stream, handler.request_deserializer),
                response_serializer=handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method, handler.unary_unary, _parse, handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _unary(self, method: str, behaviour: Any, parse: Any, deserialize: Any) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            record = _CallRecord(self._service, method, self._telemetry, context)
            try:
                response = await behaviour(parse(request, deserialize), context)
            except BaseException as error:
                await record.fail(error)
                raise
            record.finish(grpc.StatusCode.OK)
            return response

        return call

    def _streaming(self, method: str, behaviour: Any, parse: Any, deserialize: Any) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            record = _CallRecord(self._service, method, self._telemetry, context)
            try:
                async for response in behaviour(parse(request, deserialize), context):
                    yield response
            except BaseException as error:
                await record.fail(error)
                raise
            record.finish(grpc.StatusCode.OK)

        return call


class _CallRecord:
    """One call from arrival to answer."""

    def __init__(self, service: str, method: str, telemetry: Telemetry, context: Any) -> None:
        self._started = time.perf_counter()
        self._service, self._method = service, method
        self._telemetry, self._context = telemetry, context
        metadata = dict(context.invocation_metadata() or ())
        self._id = str(metadata.get(REQUEST_ID) or uuid.uuid4())[:128]
        request_id.set(self._id)
        context.set_trailing_metadata(((REQUEST_ID, self._id),))
        telemetry.inflight.labels(service).inc()

    async def fail(self, error: BaseException) -> None:
        """Answers with the rich status of `error`; cancellation passes on as it is."""
        if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            self.finish(grpc.StatusCode.CANCELLED)
            return
        if isinstance(error, grpc.aio.AbortError):  # somebody aborted on purpose
            self.finish(self._context.code() or grpc.StatusCode.UNKNOWN)
            return
        status = to_status(error, self._service, self._id)
        code = code_of(status)
        if code is grpc.StatusCode.INTERNAL:
            logging.getLogger(__name__).error("unexpected error", exc_info=error, extra={"method": self._method})
        self.finish(code, status.message)
        rich = rpc_status.to_status(status)
        trailers = (*rich.trailing_metadata, (REQUEST_ID, self._id), *trailers_of(error))
        await self._context.abort(rich.code, rich.details, trailing_metadata=trailers)

    def finish(self, code: grpc.StatusCode, message: str = "") -> None:
        """Counts and logs the call."""
        seconds = time.perf_counter() - self._started
        telemetry = self._telemetry
        telemetry.inflight.labels(self._service).dec()
        telemetry.requests.labels(self._service, self._method, code.name).inc()
        telemetry.request_seconds.labels(self._service, self._method).observe(seconds)
        if access_log.isEnabledFor(logging.INFO):
            fields = {"method": self._method, "code": code.name, "ms": round(seconds * 1000, 3)}
            if message:
                fields["error"] = message
            access_log.info("call", extra=fields)


def _parse(request: bytes, deserialize: Callable[[bytes], Any] | None) -> Any:
    if deserialize is None:
        return request
    try:
        return deserialize(request)
    except Exception as error:
        raise InvalidInput(
            "request", "the bytes are not a message of this method; check that client and server use the same protos"
        ) from error


async def _parse_stream(
    requests: AsyncIterator[bytes], deserialize: Callable[[bytes], Any] | None
) -> AsyncIterator[Any]:
    async for request in requests:
        yield _parse(request, deserialize)


def _unknown_method(method: str) -> Handler:
    async def refuse(request: bytes, context: Any) -> bytes:
        raise NotSupported(f"this server has no method {method}; gRPC reflection lists those that it has")

    return grpc.unary_unary_rpc_method_handler(refuse)
