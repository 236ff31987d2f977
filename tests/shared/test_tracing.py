"""Spans of a serving process: parents, stages, batches linked both ways, sampling; and none of it when it is off."""

import contextlib
import json
import socket
import subprocess
import sys
import threading

import grpc
import pytest
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from shared.errors import ConfigurationError
from shared.serving.calls import TraceParent
from shared.serving.config import ServingConfig
from shared.serving.tracing import Tracing
from shared.testing.graphs import publish_affine
from shared.testing.server import GatedSession, running_server
from shared.trace_settings import TraceSettings, trace_settings

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-{CALLER}-01", f"00-{TRACE}-{CALLER}-00"
RECEIVER = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"}
METHOD = "inference.GRPCInferenceService/ModelInfer"


class TracedServer:
    """A server with one graph whose runs wait for `gate`, and the spans that it made."""

    def __init__(self, server, exporter, tracing, gate):
        self.server, self.exporter, self.tracing, self.gate = server, exporter, tracing, gate
        self.stub = pb_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(server.address))

    def infer(self, *metadata, model="affine"):
        request = pb.ModelInferRequest(model_name=model)
        request.inputs.add(name="x", datatype="FP32", shape=[1, 4]).contents.fp32_contents.extend([1, 2, 3, 4])
        return self.stub.ModelInfer.future(request, metadata=metadata, timeout=20)

    def spans(self):
        """All finished spans; waits until they are exported."""
        assert self.tracing._provider.force_flush()
        return self.exporter.get_finished_spans()

    def named(self, name):
        return [span for span in self.spans() if span.name == name]


@contextlib.contextmanager
def traced_server(tmp_path, **settings):
    exporter, gate = InMemorySpanExporter(), threading.Event()
    gate.set()
    publish_affine(tmp_path, service="test", name="affine", max_batch=8)
    tracing = Tracing("test", "replica-1", TraceSettings("127.0.0.1", 1, **settings), exporter)
    config = ServingConfig(model_roots=(tmp_path,), threads=1)
    with running_server("test", config, open_session=lambda path: GatedSession(path, gate), tracing=tracing) as server:
        yield TracedServer(server, exporter, tracing, gate)


def context_of(span):
    return span.get_span_context()


def test_one_call_has_its_stages_and_its_batch_below_the_callers_span(tmp_path):
    with traced_server(tmp_path) as traced:
        traced.infer(("traceparent", SAMPLED), ("x-request-id", "request-1")).result()
        spans = {span.name: span for span in traced.spans()}
        assert set(spans) == {METHOD, "queue", "infer", "batch"}
        server = spans[METHOD]
        assert f"{context_of(server).trace_id:032x}" == TRACE
        assert (server.kind, f"{server.parent.span_id:016x}", server.parent.is_remote) == (
            SpanKind.SERVER,
            CALLER,
            True,
        )
        assert server.attributes["rpc.method"] == "ModelInfer"
        assert server.attributes["rpc.response.status_code"] == "OK"
        assert server.attributes["usagi.request_id"] == "request-1"
        assert server.resource.attributes["service.name"] == "usagi-test"
        for name in ("queue", "infer", "batch"):
            assert spans[name].parent == context_of(server), name
            assert spans[name].attributes["usagi.model"] == "affine"
            assert server.start_time <= spans[name].start_time <= spans[name].end_time <= server.end_time, name
        assert spans["queue"].end_time <= spans["infer"].start_time + 1_000_000
        assert [link.context for link in spans["batch"].links] == [context_of(server)]
        assert [link.context for link in spans["infer"].links] == [context_of(spans["batch"])]


def test_calls_that_ran_together_share_one_batch_span_linked_both_ways(tmp_path):
    with traced_server(tmp_path) as traced:
        traced.gate.clear()
        first = traced.infer()  # takes the only thread, so that the next two wait together
        wait_until(lambda: not traced.server.engine.pool._idle)
        pair = [traced.infer(), traced.infer()]
        batcher = next(iter(traced.server.engine.repository.versions()[0].loaded.values())).batcher
        wait_until(lambda: batcher.depth == 2)
        traced.gate.set()
        assert [call.result() for call in (first, *pair)]
        servers = {context_of(span).span_id: span for span in traced.named(METHOD)}
        assert len({context_of(span).trace_id for span in servers.values()}) == 3, "three traces"
        (shared,) = [span for span in traced.named("batch") if span.attributes["usagi.batch_size"] == 2]
        linked = [link.context.span_id for link in shared.links]
        assert len(linked) == 2
        assert set(linked) < set(servers)
        assert shared.parent.span_id == linked[0], "the oldest call's trace shows it"
        back = [span for span in traced.named("infer") if span.links[0].context == context_of(shared)]
        assert sorted(span.parent.span_id for span in back) == sorted(linked)


def wait_until(condition, seconds=10.0):
    done = threading.Event()
    for _ in range(int(seconds / 0.005)):
        if condition():
            return
        done.wait(0.005)
    raise AssertionError("never came true")


@pytest.mark.parametrize(
    ("settings", "parent", "kept"),
    [
        ({}, None, True),
        ({}, NOT_SAMPLED, False),
        ({"sampler": "parentbased_always_off"}, None, False),
        ({"sampler": "parentbased_always_off"}, SAMPLED, True),
        ({"sampler": "parentbased_traceidratio", "ratio": 0.0}, None, False),
        ({"sampler": "always_on"}, NOT_SAMPLED, True),
        ({"sampler": "always_off"}, SAMPLED, False),
        ({}, "rubbish", True),
    ],
)
def test_sampling_is_the_callers_or_the_samplers(tmp_path, settings, parent, kept):
    with traced_server(tmp_path, **settings) as traced:
        traced.infer(*([("traceparent", parent)] if parent else [])).result()
        assert bool(traced.spans()) == kept


def test_the_callers_mistakes_are_no_errors_of_the_server(tmp_path):
    with traced_server(tmp_path) as traced:
        with pytest.raises(grpc.RpcError):
            traced.infer(model="nobody").result()
        (span,) = traced.spans()
        assert span.attributes["rpc.response.status_code"] == "NOT_FOUND"
        assert span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize(
    "header",
    ["", "rubbish", f"00-{'0' * 32}-{CALLER}-01", f"00-{TRACE}-{'0' * 16}-01", f"ff-{TRACE}-{CALLER}-01",
     f"00-{TRACE}-{CALLER}-01-more", f"00-{TRACE.upper()}-{CALLER}-01"],
)  # fmt: skip
def test_malformed_parents_are_ignored(header):
    assert TraceParent.parse(header) is None


def test_parents_of_later_versions_are_understood():
    parent = TraceParent.parse(f"01-{TRACE}-{CALLER}-03-more")
    assert (parent.trace_id, parent.span_id, parent.sampled) == (TRACE, CALLER, True)


def test_settings_are_opentelemetrys_own_variables():
    assert trace_settings({}) is None
    assert trace_settings({**RECEIVER, "OTEL_SDK_DISABLED": "true"}) is None
    assert trace_settings({**RECEIVER, "OTEL_TRACES_EXPORTER": "none"}) is None
    settings = trace_settings(
        {
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://elsewhere:4317",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://receiver",
            "OTEL_EXPORTER_OTLP_HEADERS": "Authorization=Bearer%20x, tenant=a",
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": "0.25",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        }
    )
    assert (settings.host, settings.port, settings.secure) == ("receiver", 443, True)
    assert (settings.parent_decides, settings.root_ratio, settings.delay_ms) == (True, 0.25, 200)
    assert settings.headers == {"authorization": "Bearer x", "tenant": "a"}


def test_bad_settings_are_named_in_one_message():
    bad = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "receiver:4317",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_TRACES_SAMPLER": "sometimes",
        "OTEL_TRACES_SAMPLER_ARG": "2",
        "OTEL_BSP_SCHEDULE_DELAY": "soon",
    }
    with pytest.raises(ConfigurationError) as caught:
        trace_settings(bad)
    assert all(name in caught.value.message for name in bad)


OFF = """
import json, sys
from pathlib import Path
from shared.serving.config import ServingConfig
from shared.serving.engine import Engine
engine = Engine("test", ServingConfig(model_roots=()))
imported = [name for name in sys.modules if name.startswith("opentelemetry")]
print(json.dumps([engine.telemetry.tracing is None, imported]))
engine.close()
"""


def test_without_a_receiver_the_sdk_is_not_even_imported():
    done = subprocess.run([sys.executable, "-c", OFF], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == [True, []]


def test_usagi_traces_prints_a_trace():
    """The command as a person runs it; what sends to it is a server's own exporter."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "shared.client.cli", "traces", "--listen", f"127.0.0.1:{port}", "--count", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiver:
        wait_until(lambda: listens(port))
        tracing = Tracing("test", "replica-1", TraceSettings("127.0.0.1", port))
        tracing.start_call("/a.Service/Method", None, "request-1").end("OK", "")
        tracing.close()
        printed, _ = receiver.communicate(timeout=20)
    assert receiver.returncode == 0
    assert printed.startswith("trace ")
    assert "test a.Service/Method" in printed


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
