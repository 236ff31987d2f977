"""One call through the real gateway and the real service shows its spans, in a receiver that the test runs."""

import json
import time
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from shared.client.connection import Connection
from shared.client.local import local_stack
from shared.client.traces import TraceReceiver, draw
from shared.client.vision import VisionClient

PHOTO = next(Path("tests/data/flowers").glob("*.jpg")).read_bytes()
METHOD = "usagi.vision.v1.VisionService/ClassifyImage"
EXPECTED = {"gateway", "way to the service", "server", "preprocess", "queue", "infer", "postprocess", "batch"}


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """Everything on free ports, sending its spans to a receiver; yields both."""
    with pytest.MonkeyPatch.context() as patch, TraceReceiver() as receiver:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        with local_stack(tmp_path_factory.mktemp("logs"), free_ports=True) as stack:
            yield stack, receiver


def role(span):
    """What part of the system a span is of."""
    if span.service == "usagi-gateway":
        return "gateway" if "upstream_address" not in span.attributes else "way to the service"
    return "server" if span.name == METHOD else span.name


def call_in_a_span(stack, **options):
    """Calls as an application that uses OpenTelemetry does; its trace id and span id."""
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("application")
    with tracer.start_as_current_span("application") as span, Connection(stack.target, **options) as connection:
        VisionClient(connection).classify(PHOTO)
        context = span.get_span_context()
    return trace.format_trace_id(context.trace_id), trace.format_span_id(context.span_id)


def test_one_call_through_the_gateway_shows_its_spans_batch_included(traced):
    stack, receiver = traced
    trace_id, caller = call_in_a_span(stack)

    def complete(spans):
        return {role(span) for span in spans if span.trace == trace_id} >= EXPECTED

    spans = {role(span): span for span in receiver.wait_for(complete, 20) if span.trace == trace_id}
    assert set(spans) == EXPECTED
    assert spans["gateway"].parent == caller
    assert spans["way to the service"].parent == spans["gateway"].span
    assert spans["server"].parent == spans["way to the service"].span
    for name in ("preprocess", "queue", "infer", "postprocess", "batch"):
        assert spans[name].parent == spans["server"].span, name
        assert spans["server"].start <= spans[name].start <= spans[name].end <= spans["server"].end, name
    assert spans["batch"].links == ((trace_id, spans["server"].span),)
    assert spans["infer"].links == ((trace_id, spans["batch"].span),)
    picture = draw(list(spans.values()))
    print(picture)
    assert len(picture.splitlines()) == 1 + len(EXPECTED)
    the_logs_join_on_both_ids(stack, trace_id, spans["server"].attributes["usagi.request_id"])


def the_logs_join_on_both_ids(stack, trace_id, request_id):
    lines = (stack.logs / "vision.log").read_text(encoding="utf-8").splitlines()
    (line,) = [entry for entry in map(json.loads, lines) if entry.get("trace_id") == trace_id]
    assert line["request_id"] == request_id
    assert (line["code"], line["model"], line["batch"]) == ("OK", "flowers-efficientnet-lite0", 1)


def test_the_gateways_log_and_the_services_log_have_the_same_ids(traced):
    stack, _ = traced
    with Connection(stack.target) as connection, pytest.raises(Exception, match="image"):
        VisionClient(connection).classify(b"no picture")
    refusals = [refusal_in(stack.logs / f"{name}.log") for name in ("gateway", "vision")]
    assert refusals[0] == refusals[1]
    assert len(refusals[0][1]) == 32


def refusal_in(log):
    """Request id and trace id of the last refused call; Envoy writes its log once a second."""
    for _ in range(100):
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        if found := [entry for entry in lines if entry.get("code") == "INVALID_ARGUMENT"]:
            return found[-1]["request_id"], found[-1]["trace_id"]
        time.sleep(0.1)
    raise AssertionError(f"no refusal in {log}")


def test_health_checks_are_not_traced(traced):
    stack, receiver = traced
    trace_id, _ = call_in_a_span(stack)
    spans = receiver.wait_for(lambda spans: any(span.trace == trace_id for span in spans), 20)
    assert not [span.name for span in spans if "grpc.health" in str(span.attributes)]
