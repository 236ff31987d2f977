"""SIGTERM's order of events: NOT_SERVING first, running calls finish, new ones are refused, the process ends."""

import contextlib
import signal
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc

from shared.serving.config import ServingConfig
from shared.serving.front import FRONTS
from shared.testing.graphs import publish_affine
from shared.testing.server import GatedSession, running_server

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def infer_request():
    request = pb.ModelInferRequest(model_name="affine")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(np.ones(4, np.float32).tobytes())
    return request


@pytest.mark.parametrize("front", FRONTS)
def test_running_calls_finish_and_health_says_so_first(tmp_path, front):
    publish_affine(tmp_path)
    gate = threading.Event()
    config = ServingConfig(model_roots=(tmp_path,), threads=1, drain_seconds=0.5, front=front)
    with running_server("test", config, open_session=lambda path: GatedSession(path, gate)) as running:
        channel = grpc.insecure_channel(running.address)
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        calls = [stub.ModelInfer.future(infer_request(), timeout=30) for _ in range(20)]
        time.sleep(0.3)
        stopping = running.submit(running.server.stop())
        assert next(watch).status == NOT_SERVING
        assert not stub.ServerReady(pb.ServerReadyRequest()).ready, "still answers while it drains"
        calls.append(stub.ModelInfer.future(infer_request(), timeout=30))  # during the drain: taken too
        time.sleep(0.8)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ServerLive(pb.ServerLiveRequest(), timeout=2)
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        assert not any(call.done() for call in calls)
        gate.set()
        assert [call.result().outputs[0].name for call in calls] == ["y"] * 21
        stopping.result(5)  # the open Watch does not hold it for the 20 s of grace
        assert watch.code() is not None, "the stream has ended"
        channel.close()


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_process_ends_well_at_a_signal(tmp_path, number, front):
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-m", "services.vision.serving"],
        env={
            "PATH": "/usr/bin",
            "USAGI_PORT": "0",
            "USAGI_METRICS_PORT": "0",
            "USAGI_MODEL_ROOTS": str(tmp_path),
            "USAGI_FRONT": front,
        },
        stderr=log,
    )
    with contextlib.closing(log):
        deadline = time.monotonic() + 30
        while '"serving"' not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(15) == 0
    text = (tmp_path / "log").read_text()
    assert '"stopped"' in text
    assert "Traceback" not in text
