"""The native front: HTTP/2 and gRPC framing in Rust threads outside the interpreter lock (`pygrpc-native`).

Calls arrive in batches: a thread that holds no lock while it waits takes all that came and wakes the event loop once.
Each call gets a context with what our servicers ask of one, and runs as a task of the loop. What overload refuses ends
right there, without a task and with its message unread.

Unary calls and server streams run here. Streams of requests, reflection, Watch of grpc.health.v1 and unknown methods
go to a grpc.aio server on a Unix socket behind it, with the same handlers.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import grpc
import grpc.aio
from pygrpc_native import EVENT_CANCEL, NativeGrpcFront
from pygrpc_native._native import STREAM_CLOSED, STREAM_FULL

from shared.errors import MessageTooLarge, Unreachable
from shared.serving.front import GrpcioFront
from shared.serving.handlers import CallHandlers, Direct, Handler, Trailers
from shared.serving.status import PUSHBACK_TRAILER
from shared.serving.traffic import SHADOW_HEADER, VERSIONS_HEADER

log = logging.getLogger(__name__)

EVENTS_AT_ONCE = 256
IO_THREADS = 1
"""Of the HTTP/2 runtime: it is far from being what limits a process."""
FLUSH_SECONDS = 5.0
"""How long answers may take to leave at the end: a caller that does not read must not hold a stopping process."""
FLUSH_STEP_SECONDS = 0.01
SETTLE_SECONDS = 0.2
"""From the last answer's end to the closing of its connection, for the socket's own buffers."""


ROUTED = frozenset((VERSIONS_HEADER, SHADOW_HEADER))


class NativeFront:
    """Serves the methods of `handlers` on one insecure port.

    Args:
        handlers: all methods, wrapped.
        max_message_bytes: limit of a request and of an answer.
    """

    def __init__(self, handlers: CallHandlers, max_message_bytes: int) -> None:
        self._handlers = handlers
        self._limit = max_message_bytes
        self._methods = [
            _Method(path, handler, handlers.direct(path))
            for path, handler in handlers.methods()
            if _runs_natively(handler)
        ]
        self._calls: dict[int, NativeContext] = {}
        self._stopping = False
        self._front: NativeGrpcFront | None = None
        self._fallback = GrpcioFront(handlers, max_message_bytes, connections_age=False)

    def listen(self, address: str) -> int:
        """See Front."""
        self._front = NativeGrpcFront(
            address, [], io_threads=IO_THREADS, call_details=True, delay_stream_headers=True, metrics=True
        )
        return self._front.bound_port

    async def start(self) -> None:
        """See Front."""
        front = self._listening()
        self._folder = Path(tempfile.mkdtemp(prefix="usagi-front-"))
        self._fallback.listen(f"unix:{self._folder}/fallback.sock")
        await self._fallback.start()
        front.set_fallback(f"{self._folder}/fallback.sock")
        front.add_methods([(method.path, method.streaming) for method in self._methods])
        front.start()
        arguments = (front, asyncio.get_running_loop())
        threading.Thread(target=self._receive, args=arguments, name="front", daemon=True).start()

    async def stop(self, grace: float) -> None:
        """See Front."""
        self._stopping = True
        fallback = asyncio.ensure_future(self._fallback.stop(grace))
        for _ in range(round(grace / FLUSH_STEP_SECONDS)):
            if not self._calls:
                break
            await asyncio.sleep(FLUSH_STEP_SECONDS)
        late = list(self._calls.values())
        for context in late:
            context.end_late()
        await asyncio.gather(*(context.task for context in late if context.task), return_exceptions=True)
        await fallback
        await self._flush()
        await asyncio.to_thread(self._listening().close)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _flush(self) -> None:
        """Waits until every answer has left: close() drops what the HTTP/2 threads have not written yet."""
        for _ in range(round(FLUSH_SECONDS / FLUSH_STEP_SECONDS)):
            if not self._unanswered():
                break
            await asyncio.sleep(FLUSH_STEP_SECONDS)
        await asyncio.sleep(SETTLE_SECONDS)

    def _unanswered(self) -> int:
        methods = ((self._listening().metrics() or {}).get("methods") or {}).values()
        return sum(
            method["started"] - sum(status["count"] for status in method["status"].values()) for method in methods
        )

    def _listening(self) -> NativeGrpcFront:
        if self._front is None:
            raise RuntimeError("listen() comes first")
        return self._front

    def _receive(self, front: NativeGrpcFront, loop: asyncio.AbstractEventLoop) -> None:
        while (events := front.recv_batch_details(EVENTS_AT_ONCE)) is not None:
            try:
                loop.call_soon_threadsafe(self._take, front, loop, events)
            except RuntimeError:  # the loop was closed without stop()
                front.close()
                return

    def _take(self, front: NativeGrpcFront, loop: asyncio.AbstractEventLoop, events: list[tuple[Any, ...]]) -> None:
        for kind, call_id, method_id, payload, _, details in events:
            if kind == EVENT_CANCEL:
                if (context := self._calls.get(call_id)) is not None:
                    context.leave()
                continue
            method = self._methods[method_id]
            context = NativeContext(front, call_id, details, self._limit, self._calls)
            if (refused := self._refusal(method.path, payload)) is not None:
                context.fail(*self._handlers.refuse(method.path, refused, context))
                continue
            self._calls[call_id] = context
            if method.direct is not None and (direct := method.direct(payload, context)) is not None:
                context.direct = direct
                continue
            context.task = loop.create_task(self._run(method, context, payload))
            context.task.add_done_callback(context.released)  # also of one that is cancelled before it begins

    def _refusal(self, path: str, payload: bytes) -> Exception | None:
        if self._stopping:
            return Unreachable("the server is shutting down; call again, another replica or its successor will answer")
        if len(payload) > self._limit:
            return MessageTooLarge(len(payload), self._limit)
        return self._handlers.overloaded(path)

    async def _run(self, method: _Method, context: NativeContext, payload: bytes) -> None:
        try:
            request = payload if method.deserialize is None else method.deserialize(payload)
            if method.streaming:
                async for response in method.behaviour(request, context):
                    if not await context.send(method.serialize(response)):
                        return
                context.end_stream()
            else:
                context.respond(method.serialize(await method.behaviour(request, context)))
        except grpc.aio.AbortError:
            pass  # abort() told the caller
        except asyncio.CancelledError:
            context.fail(grpc.StatusCode.CANCELLED, "the server is shutting down")
        except Exception:  # wrapped handlers never come here
            log.exception("unexpected error", extra={"method": method.path})
            context.fail(grpc.StatusCode.INTERNAL, "internal error; see the server's log")


class _Method:
    """One method as the front runs it."""

    def __init__(self, path: str, handler: Handler, direct: Direct | None) -> None:
        self.path = path
        self.direct = direct
        self.streaming: bool = handler.response_streaming
        self.behaviour = handler.unary_stream if self.streaming else handler.unary_unary
        self.deserialize = handler.request_deserializer
        self.serialize = handler.response_serializer or bytes


def _runs_natively(handler: Handler) -> bool:
    if handler.request_streaming:
        return False
    return not handler.response_streaming or inspect.isasyncgenfunction(handler.unary_stream)


class NativeContext:
    """What a servicer may ask of a call, as grpc.aio.ServicerContext has it."""

    __slots__ = (
        *("_calls", "_code", "_ended", "_front", "_left", "_limit", "_metadata", "_peer", "_trailing"),
        *("call_id", "deadline", "direct", "task"),
    )

    def __init__(
        self,
        front: NativeGrpcFront,
        call_id: int,
        details: tuple[Any, str, float | None],
        limit: int,
        calls: dict[int, NativeContext],
    ) -> None:
        self._front, self._limit, self._calls = front, limit, calls
        self._metadata, self._peer, remaining = details
        self._trailing: Trailers = ()
        self._code: grpc.StatusCode | None = None
        self._ended = self._left = False
        self.call_id = call_id
        self.deadline = float("inf") if remaining is None else time.monotonic() + remaining
        self.task: asyncio.Task[None] | None = None
        self.direct: Any = None

    def invocation_metadata(self) -> Trailers:
        """Key and value of every header; values of `-bin` keys are bytes."""
        metadata: Trailers = self._metadata
        return metadata

    def peer(self) -> str:
        """Where the call comes from, such as `ipv4:127.0.0.1:5`."""
        return self._peer

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None without one."""
        return None if self.deadline == float("inf") else max(0.0, self.deadline - time.monotonic())

    def is_routed(self) -> bool:
        """Whether the gateway's canaries have a say in it."""
        return not ROUTED.isdisjoint(dict(self._metadata))

    def cancelled(self) -> bool:
        """Whether the caller left or its deadline passed."""
        return self._left

    def code(self) -> grpc.StatusCode | None:
        """The status that abort() set."""
        return self._code

    def set_trailing_metadata(self, trailing_metadata: Trailers) -> None:
        """Goes out with the status, unless abort() brings its own."""
        self._trailing = trailing_metadata

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Trailers = ()) -> NoReturn:
        """Ends the call with that status and raises.

        Raises:
            grpc.aio.AbortError: always.
        """
        self._code = code
        self.fail(code, details, trailing_metadata or self._trailing)
        raise grpc.aio.AbortError(details)

    def leave(self) -> None:
        """The caller left or its deadline passed: nobody waits for an answer."""
        self._left = self._ended = True
        if self.task is not None:
            self.task.cancel()
        elif self.direct is not None:
            self.direct.cancel()

    def end_late(self) -> None:
        """The server ends before the call does."""
        if self.task is not None:
            self.task.cancel()
        elif self.direct is not None:
            self.fail(grpc.StatusCode.CANCELLED, "the server is shutting down")
            self.direct.cancel()

    def release(self) -> None:
        """The call is over, whatever its outcome."""
        self._calls.pop(self.call_id, None)

    def released(self, _: object) -> None:
        """As `release`, told by the call's task when it is done."""
        self.release()

    def fail(self, code: grpc.StatusCode, details: str, trailing_metadata: Trailers = ()) -> None:
        """Ends the call with that status, if it has not ended."""
        if not self._ended:
            self._ended = True
            trailers = [pair for pair in trailing_metadata if pair[0] != PUSHBACK_TRAILER]  # the wheel reserves it
            self._front.fail(self.call_id, code.value[0], details, trailers)

    def respond(self, message: bytes) -> None:
        """Ends a unary call with its answer."""
        if len(message) > self._limit:
            self.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, MessageTooLarge(len(message), self._limit).message)
        elif not self._ended:
            self._ended = True
            self._front.respond(self.call_id, message, None, self._trailing)

    async def send(self, message: bytes) -> bool:
        """Sends one message of a stream, waiting while the caller is behind; False if nobody listens any more."""
        sent = self._front.stream_try_send(self.call_id, message)
        if sent == STREAM_FULL:
            return await asyncio.to_thread(self._front.stream_send, self.call_id, message)
        return bool(sent != STREAM_CLOSED)

    def end_stream(self) -> None:
        """Ends a stream with OK."""
        if not self._ended:
            self._ended = True
            self._front.stream_end(self.call_id, self._trailing)
