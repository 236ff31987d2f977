"""Handlers that gRPC ships (health, reflection), and those of the catalog: rich statuses, neither counted nor logged.

gRPC parses a request before a handler is called, and what it cannot parse becomes UNKNOWN or INTERNAL with a traceback
in the log. So here as in handlers.py the request is parsed inside the call.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio
from grpc_status import rpc_status

from shared.errors import InvalidInput, UsagiError
from shared.serving.calls import MAX_ID, REQUEST_ID
from shared.serving.status import to_status

log = logging.getLogger(__name__)

Handler = Any  # grpc.RpcMethodHandler has no usable type
Deserialize = Callable[[bytes], Any]
Abort = Callable[[Exception, Any], Awaitable[NoReturn]]


def parse_message(message: bytes, deserialize: Deserialize) -> Any:
    """The message that the bytes are.

    Raises:
        InvalidInput: they are none.
    """
    try:
        return deserialize(message)
    except Exception as error:
        raise InvalidInput(
            "request", "the bytes are not a message of this method; check that client and server use the same protos"
        ) from error


def guard_handler(handler: Handler, abort: Abort) -> Handler:
    """A handler of the same kind that parses its requests itself and maps its errors.

    Args:
        handler: as gRPC or its generated code makes it.
        abort: ends a call with an error, by `context.abort`.
    """
    kind = ("stream" if handler.request_streaming else "unary") + (
        "_stream" if handler.response_streaming else "_unary"
    )
    behaviour = getattr(handler, kind)
    parse = _parse_stream if handler.request_streaming else _parse
    guard = _guard_generator if inspect.isasyncgenfunction(behaviour) else _guard_coroutine
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(
        guard(behaviour, parse, handler.request_deserializer, abort), response_serializer=handler.response_serializer
    )


def _guard_coroutine(behaviour: Any, parse: Any, deserialize: Deserialize | None, abort: Abort) -> Any:
    async def call(request: Any, context: Any) -> Any:
        try:
            return await behaviour(parse(request, deserialize), context)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            if _caller_left(error):
                raise
            await abort(error, context)

    return call


def _guard_generator(behaviour: Any, parse: Any, deserialize: Deserialize | None, abort: Abort) -> Any:
    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for response in behaviour(parse(request, deserialize), context):
                yield response
        except (asyncio.CancelledError, GeneratorExit, grpc.aio.AbortError):
            raise
        except Exception as error:
            if _caller_left(error):
                raise
            await abort(error, context)

    return call


def _parse(request: bytes, deserialize: Deserialize | None) -> Any:
    return request if deserialize is None else parse_message(request, deserialize)


async def _parse_stream(requests: AsyncIterator[bytes], deserialize: Deserialize | None) -> AsyncIterator[Any]:
    async for request in requests:
        yield _parse(request, deserialize)


def _caller_left(error: Exception) -> bool:
    """gRPC could not send: there is nobody to tell, and a second abort would be an error of its own."""
    return type(error).__name__ == "ExecuteBatchError"


def aborting(service: str) -> Abort:
    """What ends calls with the rich status of their error; what is none of ours is logged with its traceback.

    Args:
        service: domain of the answering service, for ErrorInfo.
    """

    async def abort(error: Exception, context: Any) -> NoReturn:
        if not isinstance(error, UsagiError):
            log.error("unexpected error", exc_info=error)
        rich = rpc_status.to_status(to_status(error, service, request_id_of(context)))
        await context.abort(rich.code, rich.details, trailing_metadata=rich.trailing_metadata)
        raise AssertionError("abort always raises")

    return abort


def request_id_of(context: Any) -> str:
    """The id that the gateway or the caller gave the call; empty without one."""
    return str(dict(context.invocation_metadata() or ()).get(REQUEST_ID, ""))[:MAX_ID]
