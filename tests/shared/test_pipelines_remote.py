"""Pipelines over real servers on several ports: values, headers and spans, an upstream that dies and returns."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shared.errors import ConfigurationError
from shared.serving.config import ServingConfig
from shared.serving.pipelines.upstreams import upstream_addresses
from shared.serving.tracing import Tracing
from shared.testing.graphs import publish_affine
from shared.testing.server import GatedSession, running_server
from shared.trace_settings import TraceSettings
from tests.shared.pipelines import Client, metric, write_pipeline

PIPELINE = """
[[steps]]
name = "here"
model = "double"

[[steps]]
name = "there"
model = "negate"
upstream = "far"
inputs = { x = "here.y" }
when = "max(here.y) < 10"

[outputs]
y = ["there.y", "here.y"]
"""
ROWS = np.array([[1, 2, 3, 4], [1, 2, 3, 9], [0, 0, 0, 0]], np.float32)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as opened:
        return opened.getsockname()[1]


def wait_until(condition, seconds=20):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it never happened"
        time.sleep(0.02)


@pytest.fixture
def two_servers(tmp_path, monkeypatch):
    """(client, near, far, gate, spans of both): the models of the far one wait for the gate."""
    gate = threading.Event()
    gate.set()
    publish_affine(tmp_path / "near", name="double")
    publish_affine(tmp_path / "far", name="negate", scale=-1.0)
    write_pipeline(tmp_path / "near", "chain", PIPELINE)
    spans = [InMemorySpanExporter(), InMemorySpanExporter()]
    near_traces, far_traces = (Tracing("test", "r", TraceSettings("127.0.0.1", 1), exporter) for exporter in spans)

    def gated(path):
        return GatedSession(path, gate)

    settings = {"threads": 1, "rescan_seconds": 0.2}
    far_config = ServingConfig(model_roots=(tmp_path / "far",), **settings)
    with running_server("test", far_config, open_session=gated, tracing=far_traces) as far:
        monkeypatch.setenv("USAGI_UPSTREAM_FAR", far.address)
        near_config = ServingConfig(model_roots=(tmp_path / "near",), **settings)
        with running_server("test", near_config, tracing=near_traces) as near:
            client = Client(near.address)
            yield client, near, far, gate, spans
            gate.set()
            client.channel.close()


def test_values_headers_and_spans_go_along(two_servers, caplog):
    client, near, far, _, spans = two_servers
    assert client.index("chain") == ("READY", "")
    caplog.set_level("INFO", "usagi.access")
    outputs, exits = client.infer("chain", ROWS, metadata=(("x-request-id", "request-7"),))
    assert exits == ["there", "here", "there"]
    np.testing.assert_array_equal(outputs["y"], [-2 * ROWS[0], 2 * ROWS[1], -2 * ROWS[2]])
    assert far.engine.telemetry.statistics("negate", "1").inferences == 2, "only the undecided items travelled"
    calls = [record for record in caplog.records if getattr(record, "method", "").endswith("/ModelInfer")]
    assert {record.model for record in calls} == {"chain", "negate"}
    for server in (near, far):
        server.engine.telemetry.tracing._provider.force_flush()
    (call,) = [span for span in spans[0].get_finished_spans() if span.name.endswith("ModelInfer")]
    (step,) = [span for span in spans[0].get_finished_spans() if span.name == "step there"]
    (asked,) = [span for span in spans[1].get_finished_spans() if span.name.endswith("ModelInfer")]
    assert call.attributes["usagi.request_id"] == asked.attributes["usagi.request_id"] == "request-7"
    assert step.parent.span_id == call.context.span_id
    assert asked.parent.span_id == step.context.span_id
    assert asked.context.trace_id == call.context.trace_id


@pytest.mark.parametrize("how", ["deadline", "cancelled"])
def test_deadline_and_cancellation_reach_the_other_server(two_servers, how):
    client, near, far, gate, _ = two_servers
    gate.clear()
    call = client.send("chain", ROWS, timeout=0.6 if how == "deadline" else 20)
    (entry,) = far.engine.repository.versions()
    session = entry.loaded["fp32"].batcher._session
    wait_until(lambda: session.batches == [2])
    waiting = client.send("chain", ROWS, timeout=0.6 if how == "deadline" else 20)
    batcher = entry.loaded["fp32"].batcher
    wait_until(lambda: batcher.depth == 1)
    for sent in (call, waiting):
        if how == "cancelled":
            sent.cancel()
        with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
            sent.result()
    wait_until(lambda: batcher.depth == 0)  # the other server dropped what had not begun
    wait_until(lambda: metric(near.engine, "usagi_inflight_requests", service="test") == 0)
    gate.set()
    assert session.batches == [2]


def test_what_the_other_server_refuses_is_named_and_typed(two_servers):
    client, _, far, gate, _ = two_servers
    far.submit(_unload(far)).result(5)
    failed = client.failure("chain", ROWS[:1])
    assert (failed.code, failed.metadata["step"], failed.metadata["pipeline"]) == (
        "FAILED_PRECONDITION",
        "there",
        "test/chain",
    )
    assert "step `there` (model negate of far): upstream far: FAILED_PRECONDITION: model negate" in failed.message
    assert client.infer("chain", ROWS[1:2])[1] == ["here"], "who does not need it is answered"
    wait_until(lambda: not client.ready("chain"))
    far.submit(far.engine.repository.load("negate")).result(5)
    wait_until(lambda: client.ready("chain"))
    gate.clear()
    (entry,) = far.engine.repository.versions()
    batcher = entry.loaded["fp32"].batcher
    batcher.capacity = 0
    failed = client.failure("chain", ROWS[:1])
    assert (failed.code, failed.retry_after > 0) == ("RESOURCE_EXHAUSTED", True)


async def _unload(far):
    far.engine.repository.unload("negate")


def test_circles_over_two_servers(tmp_path, monkeypatch):
    """Each waits for the other to be ready; where both were ready before, the path that travels ends the call."""
    step = '[[steps]]\nname = "a"\nmodel = "{}"\n{}\n[outputs]\ny = "a.y"\n'
    for side, model in (("near", "far"), ("far", "near")):
        publish_affine(tmp_path / side, service=side, name="affine")
        ring = step.format(f"{model}-ring", f'upstream = "{model}"')
        write_pipeline(tmp_path / side, f"{side}-ring", ring, service=side)
    monkeypatch.setenv("USAGI_UPSTREAM_NEAR", "127.0.0.1:1")  # known when it runs
    settings = {"threads": 1, "rescan_seconds": 0.1}
    far_config = ServingConfig(model_roots=(tmp_path / "far",), **settings)
    with running_server("far", far_config) as far:
        monkeypatch.setenv("USAGI_UPSTREAM_FAR", far.address)
        with running_server("near", ServingConfig(model_roots=(tmp_path / "near",), **settings)) as near:
            far.engine.pipelines._upstreams._addresses["near"] = near.address
            far.engine.pipelines._upstreams._stubs.clear()
            client = Client(near.address)
            wait_until(lambda: "model far-ring of upstream far is not ready" in client.index("near-ring")[1])
            assert client.failure("near-ring", ROWS).code == "FAILED_PRECONDITION"
            # now each is ready first, and asks the other later
            write_pipeline(tmp_path / "near", "near-ring", step.format("affine", ""), service="near", version=2)
            wait_until(lambda: client.ready("near-ring"))
            far_client = Client(far.address)
            wait_until(lambda: far_client.ready("far-ring"))
            ring = step.format("far-ring", 'upstream = "far"')
            write_pipeline(tmp_path / "near", "near-ring", ring, service="near", version=3)
            wait_until(
                lambda: any(str(entry.version) == "3" and entry.plan for entry in near.engine.pipelines.versions())
            )
            failed = client.failure("near-ring", ROWS, version="3")
            assert failed.code == "FAILED_PRECONDITION"
            assert "near/near-ring → far/far-ring → near/near-ring" in failed.message
            for opened in (client, far_client):
                opened.channel.close()


@pytest.fixture
def killable(tmp_path, monkeypatch):
    """(client, start, kill): the upstream is the vision service as a process of its own."""
    port = free_port()
    publish_affine(tmp_path / "near", name="double")
    publish_affine(tmp_path / "far", service="vision", name="negate", scale=-1.0)
    write_pipeline(tmp_path / "near", "chain", PIPELINE)
    monkeypatch.setenv("USAGI_UPSTREAM_FAR", f"127.0.0.1:{port}")
    processes = []

    def start():
        environment = {
            **os.environ,
            "USAGI_PORT": str(port),
            "USAGI_METRICS_PORT": "0",
            "USAGI_MODEL_ROOTS": str(tmp_path / "far"),
            "USAGI_LOG_LEVEL": "ERROR",
        }
        processes.append(subprocess.Popen([sys.executable, "-m", "services.vision.serving"], env=environment))
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            request = health_pb2.HealthCheckRequest()
            serving = health_pb2.HealthCheckResponse.SERVING
            wait_until(lambda: check(request, wait_for_ready=True, timeout=20).status == serving)
        return processes[-1]

    try:
        with running_server(
            "test", ServingConfig(model_roots=(tmp_path / "near",), threads=1, rescan_seconds=0.2)
        ) as near:
            client = Client(near.address)
            yield client, start, near
            client.channel.close()
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_an_upstream_that_comes_dies_and_comes_again(killable):
    client, start, near = killable
    assert client.index("chain")[0] == "UNAVAILABLE"
    assert "step `there` (model negate of far): upstream far: does not answer" in client.index("chain")[1]
    assert client.failure("chain", ROWS).code == "UNAVAILABLE"
    upstream = start()
    wait_until(lambda: client.ready("chain"))
    assert client.infer("chain", ROWS)[1] == ["there", "here", "there"]

    upstream.send_signal(signal.SIGSTOP)  # it has the call, and does not answer
    call = client.send("chain", ROWS)
    here = {"pipeline": "chain", "version": "1", "step": "here", "code": "OK"}
    wait_until(lambda: metric(near.engine, "usagi_pipeline_step_calls_total", **here) == 2)
    upstream.kill()
    failed = client.failure_of(call)
    assert (failed.code, failed.metadata["step"], failed.metadata["model"]) == ("UNAVAILABLE", "there", "negate")
    assert client.infer("chain", ROWS[1:2])[1] == ["here"], "who does not need it is answered"
    wait_until(lambda: client.index("chain")[0] == "UNAVAILABLE")

    start()
    wait_until(lambda: client.ready("chain"))
    assert client.infer("chain", ROWS)[1] == ["there", "here", "there"]


def test_addresses():
    assert upstream_addresses("network", {})["vision"] == "vision:50051"
    assert upstream_addresses("local", {})["vision"].startswith("127.0.0.1:")
    assert upstream_addresses("local", {"USAGI_UPSTREAM_TRITON": "gpu:8001"})["triton"] == "gpu:8001"
    with pytest.raises(ConfigurationError, match="USAGI_UPSTREAM_TRITON"):
        upstream_addresses("local", {"USAGI_UPSTREAM_TRITON": "gpu"})
