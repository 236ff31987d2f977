"""What happens around every call of every service: request id, error mapping, metrics and the access log.

gRPC's own interceptors run Python for every call to find the handler; here every handler is wrapped once, when it is
registered. The wrapper also parses requests itself, so that bytes that are no message of the method become
INVALID_ARGUMENT instead of gRPC's bare INTERNAL.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import grpc
import grpc.aio
from grpc_status import rpc_status

from shared.errors import NotSupported, Unreachable, UsagiError
from shared.roles import ADMIN_METHODS
from shared.serving.admin import AdminGate
from shared.serving.batching import Batcher
from shared.serving.calls import REQUEST_ID, CallScope
from shared.serving.guarded import aborting, guard_handler, parse_message
from shared.serving.status import to_status, trailers_of
from shared.serving.telemetry import MethodObserver, Telemetry
from shared.serving.traffic import ShadowDropped, traffic

log = logging.getLogger(__name__)

QUIET = ("/grpc.health.", "/grpc.reflection.")
"""Methods whose calls are neither logged nor counted; gRPC's own servicers answer them."""

CONTROL = (
    "/usagi.model.",
    *(
        f"/inference.GRPCInferenceService/{name}"
        for name in ("Server", "ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics", "Repository")
    ),
)
"""Methods that need no model to run, so that overload does not concern them."""

Handler = Any  # grpc.RpcMethodHandler has no usable type
Trailers = tuple[tuple[str, str | bytes], ...]
Direct = Callable[[bytes, Any], Any]
"""Takes a message and a context; what it returns is told to `cancel` when the caller leaves. None: not this call."""


class CallHandlers(grpc.GenericRpcHandler):
    """All methods of a server, wrapped; generated `add_*_to_server` functions take it for the server.

    Args:
        telemetry: is told of every call.
        overload: gives a batcher when no model can take a call; then inference is refused before its message is read.
        gate: stands before the administrative methods.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        overload: Callable[[], Batcher | None] = lambda: None,
        gate: AdminGate | None = None,
    ) -> None:
        self._telemetry = telemetry
        self._gate = gate or AdminGate()
        self._overload = overload
        self._handlers: dict[str, Handler] = {}
        self._refusals: dict[str, Handler] = {}
        self._direct: dict[str, Direct] = {}
        self._observers: dict[str, MethodObserver] = {}
        self._unknown = telemetry.method("unknown")

    def add_generic_rpc_handlers(self, handlers: Iterable[Any]) -> None:
        """gRPC's way to register a service; the methods come by `add_registered_method_handlers`."""

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Handler]) -> None:
        """Wraps and keeps the methods of one gRPC service."""
        for name, handler in method_handlers.items():
            method = f"/{service_name}/{name}"
            if method.startswith(QUIET):
                self._handlers[method] = guard_handler(handler, aborting(self._telemetry.service))
                continue
            observer = self._observers[method] = self._telemetry.method(method)
            guarded = self._gate.guard(handler) if method in ADMIN_METHODS else handler
            self._handlers[method] = wrap_handler(guarded, observer)
            if not (handler.request_streaming or handler.response_streaming or method.startswith(CONTROL)):
                self._refusals[method] = wrap_handler(self._refusing(), observer)

    def answer_directly(self, method: str, direct: Callable[[MethodObserver], Direct]) -> None:
        """Lets a front that can do so answer some calls of a method without a task; the others go to its handler."""
        self._direct[method] = direct(self._observers[method])

    def direct(self, method: str) -> Direct | None:
        """What `answer_directly` gave for the method."""
        return self._direct.get(method)

    def methods(self) -> Iterable[tuple[str, Handler]]:
        """Path and handler of every method."""
        return self._handlers.items()

    def overloaded(self, method: str) -> UsagiError | None:
        """The error with which a call of this method is refused now; None if it may come in."""
        batcher = self._overload() if method in self._refusals else None
        return None if batcher is None else batcher.refusal()

    def refuse(self, method: str, error: Exception, context: Any) -> tuple[grpc.StatusCode, str, Trailers]:
        """Counts and logs a call that ends before its handler; its status, as abort() takes it."""
        return CallRecord(self._observers.get(method, self._unknown), context).failure(error)

    def service(self, handler_call_details: Any) -> Handler:
        """grpcio asks for the handler of a call."""
        method: str = handler_call_details.method
        refusal = self._refusals.get(method)
        if refusal is not None and self._overload() is not None:
            return refusal
        return self._handlers.get(method) or wrap_handler(_unknown_method(method), self._unknown)

    def _refusing(self) -> Handler:
        """A handler that refuses unread: as a stream it is called before gRPC waits for the message."""

        async def refuse(requests: AsyncIterator[bytes], context: Any) -> bytes:
            if traffic.get().shadow:
                raise ShadowDropped("live calls come first")
            batcher = self._overload()
            raise batcher.refusal() if batcher is not None else Unreachable("overloaded a moment ago; try again")

        return grpc.stream_unary_rpc_method_handler(refuse)


def wrap_handler(handler: Handler, observer: MethodObserver) -> Handler:
    """A handler of the same kind that observes its calls and maps their errors."""
    parse = _parse_stream if handler.request_streaming else _parse
    kind = ("stream" if handler.request_streaming else "unary") + (
        "_stream" if handler.response_streaming else "_unary"
    )
    wrap = _streaming if handler.response_streaming else _unary
    behaviour = wrap(getattr(handler, kind), parse, handler.request_deserializer, observer)
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(behaviour, response_serializer=_measured(handler.response_serializer, observer))


def _measured(serialize: Callable[[Any], bytes] | None, observer: MethodObserver) -> Callable[[Any], bytes]:
    """Serialises an answer and counts its bytes."""

    def measured(response: Any) -> bytes:
        body: bytes = response if serialize is None else serialize(response)
        observer.sent(len(body))
        return body

    return measured


def _unary(behaviour: Any, parse: Any, deserialize: Any, observer: MethodObserver) -> Any:
    async def call(request: Any, context: Any) -> Any:
        record = CallRecord(observer, context)
        record.scope.enter()
        try:
            response = await behaviour(parse(request, deserialize, observer), context)
        except asyncio.CancelledError:
            record.finish(grpc.StatusCode.CANCELLED)
            raise
        except Exception as error:
            await record.fail(error)
            raise
        record.finish(grpc.StatusCode.OK)
        return response

    return call


def _streaming(behaviour: Any, parse: Any, deserialize: Any, observer: MethodObserver) -> Any:
    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        record = CallRecord(observer, context)
        record.scope.enter()
        try:
            async for response in behaviour(parse(request, deserialize, observer), context):
                yield response
        except (asyncio.CancelledError, GeneratorExit):
            record.finish(grpc.StatusCode.CANCELLED)
            raise
        except Exception as error:
            await record.fail(error)
            raise
        record.finish(grpc.StatusCode.OK)

    return call


class CallRecord:
    """One call from arrival to answer, on gRPC's side: its trailers and its status; `scope` is the rest of it."""

    def __init__(self, observer: MethodObserver, context: Any, scope: CallScope | None = None) -> None:
        self._observer, self._context = observer, context
        self.scope = scope or observer.begin(context.invocation_metadata())
        context.set_trailing_metadata(((REQUEST_ID, self.scope.request_id),))

    async def fail(self, error: Exception) -> None:
        """Ends the call with the rich status of `error`, without a message: JSON transcoding relies on that."""
        if isinstance(error, grpc.aio.AbortError):  # the servicer set the status itself
            self.finish(self._context.code())
            return
        await self._context.abort(*self.failure(error))

    def failure(self, error: Exception) -> tuple[grpc.StatusCode, str, Trailers]:
        """Counts and logs the call as failed; its status, as abort() takes it."""
        request_id = self.scope.request_id
        status = to_status(error, self._observer.service, request_id)
        rich = rpc_status.to_status(status)
        if rich.code is grpc.StatusCode.INTERNAL:
            log.error("unexpected error", exc_info=error, extra={"method": self._observer.method})
        self.finish(rich.code, status.message)
        return rich.code, rich.details, (*rich.trailing_metadata, (REQUEST_ID, request_id), *trailers_of(error))

    def finish(self, code: grpc.StatusCode, message: str = "") -> None:
        """Counts, logs and traces the call."""
        self.scope.finish(code.name, message)


def _parse(request: bytes, deserialize: Callable[[bytes], Any] | None, observer: MethodObserver) -> Any:
    observer.received(len(request))
    return request if deserialize is None else parse_message(request, deserialize)


async def _parse_stream(
    requests: AsyncIterator[bytes], deserialize: Callable[[bytes], Any] | None, observer: MethodObserver
) -> AsyncIterator[Any]:
    async for request in requests:
        yield _parse(request, deserialize, observer)


def _unknown_method(method: str) -> Handler:
    async def refuse(request: bytes, context: Any) -> bytes:
        raise NotSupported(f"this server has no method {method}; gRPC reflection lists those that it has")

    return grpc.unary_unary_rpc_method_handler(refuse)
