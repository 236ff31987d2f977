"""Calls of ModelInfer whose header was seen before: nobody outside can tell them from others, on either front."""

import logging
import threading

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc

from shared.serving.config import ServingConfig
from shared.serving.front import FRONTS
from shared.serving.session import OnnxSession
from shared.testing.graphs import publish_affine
from shared.testing.server import running_server

BAD = 666.0


class MoodySession:
    """A real graph that waits while `gate` is shut, and fails on a value."""

    def __init__(self, path, gate):
        self._inner, self._gate = OnnxSession(path), gate

    def run(self, feeds):
        assert self._gate.wait(30)
        if BAD in feeds["x"]:
            raise ValueError("this graph does not like that number")
        return self._inner.run(feeds)


class World:
    def __init__(self, running, channel, gate, root):
        self.running, self.gate, self.root = running, gate, root
        self.stub = pb_grpc.GRPCInferenceServiceStub(channel)
        self.repository = running.engine.repository

    def sums(self):
        """Every count of the process's metrics that a call of ModelInfer moves."""
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in self.running.engine.telemetry.registry.collect()
            for sample in family.samples
            if sample.name.endswith(("_total", "_count", "_bytes_sum")) and sample.name.startswith("usagi_")
        }

    def statistics(self):
        (found,) = self.stub.ModelStatistics(pb.ModelStatisticsRequest(name="affine", version="1")).model_stats
        return found


@pytest.fixture(params=FRONTS)
def world(tmp_path, request):
    publish_affine(tmp_path)
    gate = threading.Event()
    gate.set()
    config = ServingConfig(model_roots=(tmp_path,), threads=1, queue_size=2, front=request.param, rescan_seconds=60)
    with (
        running_server("test", config, open_session=lambda path: MoodySession(path, gate)) as running,
        grpc.insecure_channel(running.address) as channel,
    ):
        yield World(running, channel, gate, tmp_path)
        gate.set()


def request_for(*values, **more):
    array = np.array([values], np.float32)
    request = pb.ModelInferRequest(model_name="affine", **more)
    request.inputs.add(name="x", datatype="FP32", shape=array.shape)
    request.raw_input_contents.append(array.tobytes())
    return request


def values_of(response):
    return np.frombuffer(response.raw_output_contents[0], np.float32).tolist()


def grown(before, after):
    return {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}


def test_the_second_call_answers_and_counts_as_the_first(world):
    changes = []
    for number in range(3):
        before, past = world.sums(), world.statistics()
        response, call = world.stub.ModelInfer.with_call(
            request_for(number, 2, 3, 4, id=f"i{number}"), metadata=(("x-request-id", f"r{number}"),)
        )
        assert values_of(response) == [2.0 * number, 4, 6, 8]
        assert (response.id, response.model_name, response.model_version) == (f"i{number}", "affine", "1")
        assert response.parameters["variant"].string_param == "fp32"
        assert dict(call.trailing_metadata())["x-request-id"] == f"r{number}"
        now = world.statistics()
        assert (now.inference_count - past.inference_count, now.execution_count - past.execution_count) == (1, 1)
        assert now.inference_stats.success.count - past.inference_stats.success.count == 1
        changes.append({k: v for k, v in grown(before, world.sums()).items() if "ModelStatistics" not in str(k)})
    assert changes[0] == changes[1] == changes[2]
    assert {name for name, _ in changes[0]} >= {"usagi_requests_total", "usagi_stage_duration_seconds_count"}


def test_the_access_log_is_the_same(world, caplog):
    with caplog.at_level(logging.INFO, logger="usagi.access"):
        for _ in range(2):
            world.stub.ModelInfer(request_for(1, 2, 3, 4))
        wait_for(lambda: len(infer_records(caplog)) == 2)  # a call is logged after its answer left
    for record in infer_records(caplog):
        assert (record.code, record.model, record.version, record.variant, record.batch) == (
            "OK",
            "affine",
            "1",
            "fp32",
            1,
        )


def infer_records(caplog):
    return [record for record in list(caplog.records) if record.method.endswith("/ModelInfer")]


def test_errors_of_the_graph_have_their_status(world):
    world.stub.ModelInfer(request_for(1, 2, 3, 4))
    with pytest.raises(grpc.RpcError) as caught:
        world.stub.ModelInfer(request_for(1, 2, 3, BAD), metadata=(("x-request-id", "bad"),))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(caught.value).details[0].Unpack(info)
    assert info.metadata["request_id"] == "bad"
    assert world.statistics().inference_stats.fail.count == 1
    assert values_of(world.stub.ModelInfer(request_for(0, 0, 0, 1))) == [0, 0, 0, 2]


def test_a_header_means_what_the_model_is_now(world):
    world.stub.ModelInfer(request_for(1, 2, 3, 4))
    publish_affine(world.root, version=2, scale=3.0)
    world.running.submit(world.repository.rescan()).result(30)
    for _ in range(2):
        response = world.stub.ModelInfer(request_for(1, 2, 3, 4))
        assert (values_of(response), response.model_version) == ([3, 6, 9, 12], "2")
    publish_affine(world.root, version=3, features=2)
    world.running.submit(world.repository.rescan()).result(30)
    for _ in range(2):
        with pytest.raises(grpc.RpcError, match=r"expected \[-1, 2\]"):
            world.stub.ModelInfer(request_for(1, 2, 3, 4))
    world.stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="affine"))
    for _ in range(2):
        with pytest.raises(grpc.RpcError) as caught:
            world.stub.ModelInfer(request_for(1, 2))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_deadlines_cancellations_and_overload_leave_nothing_behind(world):
    world.stub.ModelInfer(request_for(1, 2, 3, 4))
    world.gate.clear()
    running = world.stub.ModelInfer.future(request_for(1, 1, 1, 1))
    (served,) = world.repository.versions()[0].loaded.values()
    wait_for(lambda: served.leases == 1)
    late = world.stub.ModelInfer.future(request_for(2, 2, 2, 2), timeout=0.3)
    left = world.stub.ModelInfer.future(request_for(3, 3, 3, 3))
    wait_for(lambda: served.leases >= 3)
    left.cancel()
    with pytest.raises(grpc.RpcError) as caught:
        late.result(10)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_for(lambda: (served.leases, served.batcher.depth) == (1, 0))
    calls = [world.stub.ModelInfer.future(request_for(4, 4, 4, 4)) for _ in range(40)]  # 10 places, 1 taken
    wait_for(lambda: sum(call.done() for call in calls) == 31)
    refused = [call for call in calls if call.done() and call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED]
    assert len(refused) == 31
    world.gate.set()
    assert values_of(running.result(10)) == [2, 2, 2, 2]
    answered = [values_of(call.result(10)) for call in calls if call not in refused]
    assert answered == [[8.0] * 4] * 9
    wait_for(lambda: (served.leases, served.batcher._admitted) == (0, 0))
    dropped = {
        sample.labels["reason"]: sample.value
        for sample in world.running.engine.telemetry.dropped.collect()[0].samples
        if sample.name.endswith("_total")
    }
    assert dropped == {"deadline": 1, "cancelled": 1}


def wait_for(condition):
    pause = threading.Event()
    for _ in range(1000):
        if condition():
            return
        pause.wait(0.01)
    pytest.fail("it never came true")


def test_a_stopping_server_answers_what_it_took(tmp_path):
    publish_affine(tmp_path)
    gate = threading.Event()
    gate.set()
    config = ServingConfig(model_roots=(tmp_path,), threads=1, front="native")
    with (
        running_server("test", config, open_session=lambda path: MoodySession(path, gate)) as running,
        grpc.insecure_channel(running.address) as channel,
    ):
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        stub.ModelInfer(request_for(1, 2, 3, 4))
        gate.clear()
        calls = [stub.ModelInfer.future(request_for(number, 0, 0, 0)) for number in range(5)]
        (served,) = running.engine.repository.versions()[0].loaded.values()
        wait_for(lambda: served.leases == 5)
        stopping = running.submit(running.server.stop())
        threading.Timer(0.3, gate.set).start()
        assert [values_of(call.result(10))[0] for call in calls] == [0, 2, 4, 6, 8]
        stopping.result(20)
