"""Overload of a real server in its own process: exactly one batch and one queue are served, the rest refused fast."""

import asyncio
import collections
import multiprocessing
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
import uvloop
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc

from shared.serving.config import ServingConfig
from shared.serving.engine import Engine
from shared.serving.front import FRONTS
from shared.serving.server import ModelServer
from shared.testing.graphs import publish_affine
from shared.testing.server import GatedSession, no_services

CALLS, QUEUE, BATCH = 500, 100, 8
REFUSAL_SECONDS, BURSTS = 0.100, 3
"""Of three bursts the quickest counts: what else the machine does only ever slows one down."""


def serve_gated(root, front, gate, ports, stop, batches):
    """The server's process: every run of the graph waits for `gate`."""
    sessions = []

    def open_session(path):
        sessions.append(GatedSession(path, gate))
        return sessions[-1]

    async def main():
        config = ServingConfig(
            model_roots=(Path(root),), port=0, metrics_port=0, threads=1, queue_size=QUEUE, front=front
        )
        engine = Engine("test", config, open_session)
        server = ModelServer(engine, no_services)
        await server.start()
        ports.put(server.port)
        await asyncio.to_thread(stop.wait)
        dropped = sum(
            sample.value
            for metric in engine.telemetry.dropped.collect()
            for sample in metric.samples
            if sample.name.endswith("_total")
        )
        await server.stop()
        batches.put((sessions[0].batches, dropped))

    uvloop.run(main())


class GatedServer:
    def __init__(self, root, front):
        self.front = front
        context = multiprocessing.get_context("spawn")
        self.gate, self._stop = context.Event(), context.Event()
        self._ports, self._batches = context.Queue(), context.Queue()
        arguments = (str(root), front, self.gate, self._ports, self._stop, self._batches)
        self._process = context.Process(target=serve_gated, args=arguments, daemon=True)
        self._process.start()
        self.address = f"127.0.0.1:{self._ports.get(timeout=60)}"

    def finish(self):
        """Stops the server; the batch sizes that ran, and how many items were dropped."""
        self._stop.set()
        result = self._batches.get(timeout=30)
        self._process.join(30)
        return result


@pytest.fixture(params=FRONTS)
def server(tmp_path, request):
    publish_affine(tmp_path, max_batch=BATCH)
    gated = GatedServer(tmp_path, request.param)
    yield gated
    gated.gate.set()
    gated._stop.set()
    gated._process.join(30)
    assert not gated._process.is_alive()


def infer_request():
    request = pb.ModelInferRequest(model_name="affine")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(np.arange(4, dtype=np.float32).tobytes())
    return request


def burst(method, message):
    """`CALLS` calls sent back to back: their futures, and a list that fills with (future, seconds) as they end."""
    ended = []

    def send():
        started = time.perf_counter()
        future = method.future(message, timeout=60)
        future.add_done_callback(lambda done: ended.append((done, time.perf_counter() - started)))
        return future

    return [send() for _ in range(CALLS)], ended


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def slowest_of(ended):
    return max(seconds for _, seconds in ended)


def quick_enough(front, slowest, trivial_slowest):
    """grpc.aio cannot answer 500 calls of any kind in 100 ms reliably, so there calls that do nothing set the scale."""
    return slowest < (REFUSAL_SECONDS if front == "native" else max(REFUSAL_SECONDS, 3 * trivial_slowest))


def slowest_of_another_burst(stub):
    """While the queue is full already, so that all are refused."""
    _, trivial = burst(stub.ServerLive, pb.ServerLiveRequest())
    wait_until(lambda: len(trivial) == CALLS)
    _, refusals = burst(stub.ModelInfer, infer_request())
    wait_until(lambda: len(refusals) == CALLS)
    assert {refused.code().name for refused, _ in refusals} == {"RESOURCE_EXHAUSTED"}
    return slowest_of(refusals), slowest_of(trivial)


def test_500_calls_at_once(server):
    with grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        _, trivial = burst(stub.ServerLive, pb.ServerLiveRequest())
        wait_until(lambda: len(trivial) == CALLS)
        futures, ended = burst(stub.ModelInfer, infer_request())
        wait_until(lambda: len(ended) >= CALLS - QUEUE - BATCH)
        time.sleep(0.3)  # nobody else may be answered while the gate is shut
        refusals = list(ended)
        assert collections.Counter(refused.code().name for refused, _ in refusals) == {"RESOURCE_EXHAUSTED": 392}
        times = [(slowest_of(refusals), slowest_of(trivial))]
        while len(times) < BURSTS and not quick_enough(server.front, *times[-1]):
            times.append(slowest_of_another_burst(stub))
        server.gate.set()
        refused = {future for future, _ in refusals}
        answers = [future.result() for future in futures if future not in refused]
    assert len(answers) == QUEUE + BATCH
    assert all(np.frombuffer(answer.raw_output_contents[0], np.float32)[3] == 6 for answer in answers)
    for error, _ in refusals:
        details = {packed.TypeName() for packed in rpc_status.from_call(error).details}
        assert {"google.rpc.RetryInfo", "google.rpc.ErrorInfo"} <= details
        if server.front == "grpcio":  # the native front cannot send keys that gRPC reserves; RetryInfo says the same
            assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
    print(f"slowest refusal, slowest of {CALLS} trivial calls, seconds, burst by burst: {times}")
    assert quick_enough(server.front, *times[-1]), times
    batches, dropped = server.finish()
    assert sum(batches) == QUEUE + BATCH
    assert dropped == 0


def test_cancelled_and_expired_calls_never_run(server):
    request = infer_request()

    async def main():
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = pb_grpc.GRPCInferenceServiceStub(channel)
            first = stub.ModelInfer(request)
            await asyncio.sleep(0.3)  # it runs, held by the gate
            cancelled = [stub.ModelInfer(request) for _ in range(20)]
            expiring = [stub.ModelInfer(request, timeout=0.3) for _ in range(20)]
            await asyncio.sleep(0.15)
            for call in cancelled:
                call.cancel()
            codes = collections.Counter()
            for call in expiring:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                codes[caught.value.code().name] += 1
            await asyncio.sleep(0.2)
            last = stub.ModelInfer(request)
            await asyncio.sleep(0.1)
            server.gate.set()
            await asyncio.gather(first, last)
            return codes

    assert asyncio.run(asyncio.wait_for(main(), 60)) == {"DEADLINE_EXCEEDED": 20}
    batches, dropped = server.finish()
    assert batches == [1, 1], "only the first and the last call ran"
    assert dropped == 40


def test_refusal_explains_itself(server):
    request = infer_request()

    async def main():
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = pb_grpc.GRPCInferenceServiceStub(channel)
            calls = [stub.ModelInfer(request) for _ in range(QUEUE + BATCH)]
            await asyncio.sleep(0.5)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ModelInfer(request)
            metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name="affine"), timeout=5)
            assert metadata.versions == ["1"], "what needs no place in the queue is answered as ever"
            server.gate.set()
            await asyncio.gather(*calls)
            return caught.value

    status = rpc_status.from_call(asyncio.run(asyncio.wait_for(main(), 60)))
    assert "108 places" in status.message
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("QUEUE_FULL", "test.usagi.dev")
