"""A served model with a response cache: on either front, while its versions and its configuration change."""

import logging
import threading
import time

import grpc
import numpy as np
import pytest
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc
from prometheus_client import generate_latest

from shared.serving.config import ServingConfig
from shared.serving.front import FRONTS
from shared.serving.session import OnnxSession
from shared.testing.graphs import publish_affine
from shared.testing.server import running_server
from tests.shared.pipelines import Client, write_pipeline

BAD = -1.0
CHAIN = """
[[steps]]
name = "once"
model = "affine"

[[steps]]
name = "twice"
model = "affine"
inputs = { x = "once.y" }
when = "max(once.y) < 10"

[outputs]
y = ["twice.y", "once.y"]
"""


class CountingSession:
    """A real graph that fails on a value and counts its runs; `gate` shut makes runs wait."""

    def __init__(self, path, runs, gate):
        self._inner, self._runs, self._gate = OnnxSession(path), runs, gate

    def run(self, feeds):
        if feeds["x"].any():  # not the warm-up
            self._runs.append(feeds["x"].shape[0])
            assert self._gate.wait(20)
        if BAD in feeds["x"]:
            raise ValueError("this graph does not like that number")
        return self._inner.run(feeds)


class World:
    def __init__(self, root, running, channel, runs, gate):
        self.root, self.running, self.runs, self.gate = root, running, runs, gate
        self.stub = pb_grpc.GRPCInferenceServiceStub(channel)

    def ask(self, value, *, rows=1, version="", model="affine", **more):
        array = np.full((rows, 4), value, np.float32)
        request = pb.ModelInferRequest(model_name=model, model_version=version, **more)
        request.inputs.add(name="x", datatype="FP32", shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
        return self.stub.ModelInfer.future(request, timeout=20)

    def answer(self, value, **more):
        """The first number of the output, the version, and whether it came from the cache."""
        response = self.ask(value, **more).result()
        number = float(np.frombuffer(response.raw_output_contents[0], np.float32)[0])
        return number, response.model_version, response.parameters["cached"].bool_param

    def configure(self, text):
        (self.root / "test/affine/model.toml").write_text(text)
        self.rescan()

    def rescan(self):
        self.running.submit(self.running.engine.repository.rescan()).result(20)

    def metrics(self, name):
        text = generate_latest(self.running.engine.telemetry.registry).decode()
        lines = [line.rpartition(" ") for line in text.splitlines() if line.startswith(name)]
        return {labels.partition("{")[2].rstrip("}"): float(value) for labels, _, value in lines}

    def statistics(self, version="1"):
        (found,) = self.stub.ModelStatistics(pb.ModelStatisticsRequest(name="affine", version=version)).model_stats
        return found


@pytest.fixture(params=FRONTS)
def world(tmp_path, request):
    publish_affine(tmp_path)
    (tmp_path / "test/affine/model.toml").write_text("cache = { megabytes = 1 }")
    write_pipeline(tmp_path, "chain", CHAIN)
    runs, gate = [], threading.Event()
    gate.set()
    config = ServingConfig(model_roots=(tmp_path,), front=request.param, rescan_seconds=600, threads=1)
    with (
        running_server("test", config, open_session=lambda path: CountingSession(path, runs, gate)) as running,
        grpc.insecure_channel(running.address) as channel,
    ):
        yield World(tmp_path, running, channel, runs, gate)
        gate.set()


def wait_until(condition):
    ends = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.005)


def infer_records(caplog):
    return [record for record in list(caplog.records) if record.method.endswith("/ModelInfer")]


def test_hits_are_told_and_counted(world, caplog):
    with caplog.at_level(logging.INFO, logger="usagi.access"):
        assert [world.answer(3) for _ in range(4)] == [(6.0, "1", False), *[(6.0, "1", True)] * 3]
        assert world.answer(4) == (8.0, "1", False)
        response = world.ask(3, id="me").result()
        wait_until(lambda: len(infer_records(caplog)) == 6)  # a call is logged after its answer left
    assert (response.id, response.parameters["batch_size"].int64_param) == ("me", 1)
    assert len(world.runs) == 2
    found = world.statistics()
    stats = found.inference_stats
    assert (found.inference_count, found.execution_count) == (2, 2), "as Triton counts: without hits"
    assert (stats.success.count, stats.queue.count, stats.compute_infer.count) == (6, 6, 2)
    assert (stats.cache_hit.count, stats.cache_miss.count) == (4, 2)
    assert stats.cache_hit.ns > 0 < stats.cache_miss.ns
    counted = world.metrics("usagi_cache_requests_total")
    labels = 'model="affine",result="{}",variant="fp32",version="1"'
    assert counted == {labels.format("hit"): 4, labels.format("miss"): 2}
    assert sum(world.metrics("usagi_cache_bytes").values()) > 2000
    records = infer_records(caplog)
    assert [getattr(record, "cached", False) for record in records] == [False, True, True, True, False, True]
    assert {(record.model, record.version, record.variant, record.batch) for record in records} == {
        ("affine", "1", "fp32", 1)
    }
    assert world.stub.ModelConfig(pb.ModelConfigRequest(name="affine")).config.response_cache.enable


def test_callers_at_once_share_a_run_and_one_that_leaves_fails_nobody(world):
    world.answer(1)
    batcher = world.running.engine.repository.find("affine").loaded["fp32"].batcher
    world.gate.clear()
    blocker = world.ask(50)
    wait_until(lambda: len(world.runs) == 2)
    calls = [world.ask(7) for _ in range(6)]
    wait_until(lambda: [len(flight.requests) for flight in list(batcher._flights.values())] == [1, 6])
    calls.pop(0).cancel()
    wait_until(lambda: [len(flight.requests) for flight in list(batcher._flights.values())] == [1, 5])
    world.gate.set()
    answers = [call.result() for call in (*calls, blocker)]
    assert {np.frombuffer(answer.raw_output_contents[0], np.float32)[0] for answer in answers} == {14.0, 100.0}
    assert len(world.runs) == 3
    assert world.answer(7)[2]


def test_errors_are_not_kept(world):
    for _ in range(3):
        with pytest.raises(grpc.RpcError):
            world.ask(BAD).result()
    assert len(world.runs) == 3
    assert world.answer(3) == (6.0, "1", False)


def test_an_answer_ends_with_its_version(world):
    world.answer(3)
    publish_affine(world.root, version=2, scale=5.0)
    world.rescan()
    assert [world.answer(3) for _ in range(2)] == [(15.0, "2", False), (15.0, "2", True)]
    assert world.answer(3, version="1") == (6.0, "1", True), "another version, another answer"
    publish_affine(world.root, version=2, scale=7.0)
    world.rescan()
    assert [world.answer(3) for _ in range(2)] == [(21.0, "2", False), (21.0, "2", True)]
    world.running.engine.repository.unload("affine", "2")
    assert world.answer(3) == (6.0, "1", True)
    assert len(world.metrics("usagi_cache_bytes")) == 1


def test_switched_off_and_on_and_smaller_while_serving(world):
    world.answer(3)
    world.configure("versions = 'all'")
    assert [world.answer(3)[2] for _ in range(2)] == [False, False]
    assert world.metrics("usagi_cache_bytes") == {}
    assert not world.stub.ModelConfig(pb.ModelConfigRequest(name="affine")).config.HasField("response_cache")
    world.configure("cache = { megabytes = 0.004 }")
    assert [world.answer(value)[2] for value in (1, 1, 2, 3, 4, 1)] == [False, True, False, False, False, False]
    assert sum(world.metrics("usagi_cache_evictions_total").values()) == 2
    assert sum(world.metrics("usagi_cache_bytes").values()) <= 4000
    assert [world.answer(3)[2] for _ in range(2)] == [True, True], "a queue of another kind counts its places anew"
    for text in ("cache = 5", "cache = { megabytes = 0 }", "cache = { mb = 1 }", "cache = { megabytes = true }"):
        world.configure(text)
        assert "expected { megabytes = 64 }" in world.running.engine.repository.find("affine").reason
        assert world.answer(3)[2], "what was said before holds"


def test_pipelines_keep_their_exit_steps(world):
    client = Client(world.running.address)
    rows = [[1] * 4, [6] * 4]
    for cached in (False, True):
        outputs, exits = client.infer("chain", rows)
        assert outputs["y"].tolist() == [[4] * 4, [12] * 4]
        assert exits == ["twice", "once"]
        answer = client.send("chain", rows).result()
        assert answer.parameters["cached"].bool_param, cached
    outputs, exits = client.infer("chain", rows[1:])
    assert (outputs["y"].tolist(), exits) == ([[12] * 4], ["once"])


def test_typed_contents_and_chosen_outputs_ask_the_same_question(world):
    world.answer(3)
    request = pb.ModelInferRequest(model_name="affine")
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    tensor.contents.fp32_contents.extend([3] * 4)
    request.parameters["binary_data_output"].bool_param = False
    request.outputs.add(name="y").parameters["classification"].int64_param = 1
    response = world.stub.ModelInfer(request)
    assert response.parameters["cached"].bool_param
    assert response.outputs[0].contents.bytes_contents == [b"6.000000:0"]
