"""What only the native front has to prove: streams, cancellation, limits and shutdown through its own context."""

import asyncio
import concurrent.futures
import contextlib
import threading

import grpc
import h2.connection
import h2.events
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc
from pygrpc_native import EVENT_CANCEL

from shared.errors import InvalidInput
from shared.serving import options
from shared.serving.front import FRONTS, make_front
from shared.serving.handlers import CallHandlers
from shared.serving.telemetry import Telemetry

LIMIT = 1024 * 1024


class Streams:
    """Methods of every shape that runs natively."""

    def __init__(self):
        self.cancelled = threading.Event()
        self.sent = 0

    async def count(self, request, context):
        """As many messages as the request has bytes."""
        for number in range(len(request)):
            self.sent = number
            yield number.to_bytes(4, "big") + bytes(60_000)

    async def fail_late(self, request, context):
        """One message, then an error."""
        yield b"first"
        raise InvalidInput("request", "is wrong, seen late")

    async def hang(self, request, context):
        """Waits until the caller leaves."""
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def echo(self, request, context):
        """The request, with what the context knows."""
        assert context.peer().startswith("ipv4:127.0.0.1")
        assert dict(context.invocation_metadata())["x-key"] == "value"
        remaining = context.time_remaining()
        assert remaining is None or remaining > 0
        return request

    async def double(self, request, context):
        """Twice the request."""
        return request + request


@pytest.fixture(params=FRONTS)
def served(request):
    streams = Streams()
    handlers = CallHandlers(Telemetry("test"))
    methods = {
        "Count": grpc.unary_stream_rpc_method_handler(streams.count),
        "FailLate": grpc.unary_stream_rpc_method_handler(streams.fail_late),
        "Hang": grpc.unary_unary_rpc_method_handler(streams.hang),
        "Echo": grpc.unary_unary_rpc_method_handler(streams.echo),
        "Double": grpc.unary_unary_rpc_method_handler(streams.double),
    }
    handlers.add_registered_method_handlers("test.Streams", methods)
    started = concurrent.futures.Future()

    async def main():
        front, stop = make_front(request.param, handlers, LIMIT), asyncio.Event()
        port = front.listen("127.0.0.1:0")
        await front.start()
        started.set_result((port, stop, asyncio.get_running_loop()))
        await stop.wait()
        await front.stop(0.2)

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    port, stop, loop = started.result(10)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield streams, channel, lambda: loop.call_soon_threadsafe(stop.set), request.param
    loop.call_soon_threadsafe(stop.set) if thread.is_alive() else None
    thread.join(10)
    assert not thread.is_alive()


def info_of(error):
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(error).details[0].Unpack(info)
    return info


def test_unary_and_metadata(served):
    _, channel, _, _ = served
    call = channel.unary_unary("/test.Streams/Echo")
    answer, state = call.with_call(b"abc", metadata=(("x-key", "value"), ("x-request-id", "r1")), timeout=5)
    assert answer == b"abc"
    assert dict(state.trailing_metadata())["x-request-id"] == "r1"


def test_a_stream_longer_than_every_buffer_arrives_in_order(served):
    _, channel, _, _ = served
    answers = channel.unary_stream("/test.Streams/Count")(bytes(300))
    assert [int.from_bytes(answer[:4], "big") for answer in answers] == list(range(300))


def test_a_slow_reader_holds_its_stream_back(served):
    streams, channel, _, _ = served
    answers = channel.unary_stream("/test.Streams/Count")(bytes(10_000))
    next(answers)
    assert not streams.cancelled.wait(0.5)
    assert streams.sent < 2_000, "the sender waits for the reader instead of filling memory"
    answers.cancel()


def test_a_stream_ends_with_its_error(served):
    _, channel, _, _ = served
    answers = channel.unary_stream("/test.Streams/FailLate")(b"")
    assert next(answers) == b"first"
    with pytest.raises(grpc.RpcError) as caught:
        next(answers)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert info_of(caught.value).reason == "INVALID_INPUT"


@pytest.mark.parametrize("timeout", [0.2, 30])
def test_the_handler_learns_that_its_caller_left(served, timeout):
    streams, channel, _, _ = served
    call = channel.unary_unary("/test.Streams/Hang").future(b"", timeout=timeout)
    if timeout > 1:
        assert not streams.cancelled.wait(0.3)
        call.cancel()
    assert streams.cancelled.wait(10)


@pytest.mark.parametrize("size", [LIMIT + 1, LIMIT // 2 + 1], ids=["request", "answer"])
def test_messages_over_the_limit(served, size):
    _, channel, _, front = served
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/test.Streams/Double")(bytes(size), timeout=5)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    if front == "native":  # grpcio says it in its own words
        assert f"expected at most {LIMIT}" in caught.value.details()
    if front == "native" and size > LIMIT:
        assert info_of(caught.value).reason == "MESSAGE_TOO_LARGE"


def test_unknown_methods_and_services(served):
    _, channel, _, _ = served
    for method in ("/test.Streams/Nope", "/no.Such/Service"):
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(method)(b"", timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert info_of(caught.value).reason == "NOT_SUPPORTED"


def test_what_outlives_the_grace_is_ended(served):
    streams, channel, stop, _ = served
    call = channel.unary_unary("/test.Streams/Hang").future(b"", timeout=30)
    assert not streams.cancelled.wait(0.3)
    stop()
    with pytest.raises(grpc.RpcError) as caught:
        call.result(10)
    assert caught.value.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
    assert streams.cancelled.wait(10)


def test_live_with_no_handler_registered_natively():
    """The protocol's stubs know nothing of fronts: a plain stub against a front without methods."""
    handlers = CallHandlers(Telemetry("test"))

    async def main(front):
        made = make_front(front, handlers, LIMIT)
        port = made.listen("127.0.0.1:0")
        await made.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await pb_grpc.GRPCInferenceServiceStub(channel).ServerLive(pb.ServerLiveRequest(), timeout=5)
        await made.stop(0.1)
        return caught.value.code()

    for front in FRONTS:
        assert asyncio.run(main(front)) is grpc.StatusCode.UNIMPLEMENTED


def test_the_server_behind_the_native_front_keeps_its_connection(monkeypatch):
    """When it ended every 5 minutes, streams that were just sent were lost with UNAVAILABLE."""
    monkeypatch.setattr(options, "CONNECTION_AGE_MS", 100)
    handlers = CallHandlers(Telemetry("test"))

    async def goodbyes(made):
        """How often the server behind says that the connection ends, within half a second."""
        await made.start()
        client = h2.connection.H2Connection()
        client.initiate_connection()
        reader, writer = await asyncio.open_unix_connection(f"{made._folder}/fallback.sock")
        writer.write(client.data_to_send())
        events = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                while data := await reader.read(65_536):
                    events += client.receive_data(data)
        writer.close()
        await made.stop(0.1)
        assert any(isinstance(event, h2.events.RemoteSettingsChanged) for event in events), "it is an HTTP/2 server"
        return sum(isinstance(event, h2.events.ConnectionTerminated) for event in events)

    async def main():
        made = make_front("native", handlers, LIMIT)
        made.listen("127.0.0.1:0")
        return await goodbyes(made)

    assert asyncio.run(main()) == 0


def test_calls_that_are_cancelled_before_they_begin_are_forgotten():
    """A call and its end in one batch of the wheel's events: the task is cancelled before its first step."""
    handlers = CallHandlers(Telemetry("test"))
    hang = grpc.unary_unary_rpc_method_handler(Streams().hang)
    handlers.add_registered_method_handlers("test.Streams", {"Hang": hang})

    async def main():
        front = make_front("native", handlers, LIMIT)
        front.listen("127.0.0.1:0")
        await front.start()
        method = next(index for index, method in enumerate(front._methods) if method.path.endswith("Hang"))
        details = ((), "ipv4:127.0.0.1:1", None)
        call = ("call", 1 << 40, method, b"", None, details)  # an id that no real call has
        front._take(front._listening(), asyncio.get_running_loop(), [call, (EVENT_CANCEL, *call[1:])])
        held = len(front._calls)
        await asyncio.sleep(0.05)
        left, started = len(front._calls), asyncio.get_running_loop().time()
        await front.stop(20.0)
        return held, left, asyncio.get_running_loop().time() - started

    held, left, seconds = asyncio.run(main())
    assert (held, left) == (1, 0)
    assert seconds < 5, "stopping waits for nobody"
