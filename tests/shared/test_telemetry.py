"""Metrics of a serving process: the right labels, and never more series than promised."""

import pytest

from shared.serving.batching import BatchReport
from shared.serving.calls import current_call
from shared.serving.telemetry import KEPT_SERIES, Telemetry


@pytest.fixture
def telemetry():
    return Telemetry("test")


@pytest.fixture(autouse=True)
def no_call_left():
    token = current_call.set(None)
    yield
    current_call.reset(token)


def series(telemetry, name):
    """Label sets of a metric's samples, `le` left out."""
    return {
        tuple(value for key, value in sorted(sample.labels.items()) if key != "le")
        for metric in telemetry.registry.collect()
        for sample in metric.samples
        if sample.name == name
    }


def run_once(telemetry, version):
    observer = telemetry.observer("m", version, "fp32")
    telemetry.loaded(observer.labels, seconds=0.1, size_bytes=10, depth=lambda: 3)
    observer.ran(BatchReport(1, 1.0, 0.01, [None], [0.99]))
    observer.rejected("queue_full")
    observer.dropped("deadline")
    return observer


def test_a_batch_counts_for_the_method_of_each_of_its_calls(telemetry):
    calls = [telemetry.method(name).begin(()) for name in ("/a/One", "/a/Two", "/a/Two")]
    observer = telemetry.observer("m", "1", "fp32")
    observer.ran(BatchReport(3, 10.0, 0.5, calls, [9.0, 9.5, 9.9]))
    get = telemetry.registry.get_sample_value
    labels = {"model": "m", "version": "1", "variant": "fp32"}
    assert get("usagi_batch_size_count", labels) == 1
    assert get("usagi_batch_size_sum", labels) == 3
    for method, count, queued in (("/a/One", 1, 1.0), ("/a/Two", 2, 0.6)):
        stage = {**labels, "method": method}
        assert get("usagi_stage_duration_seconds_count", {**stage, "stage": "infer"}) == count
        assert get("usagi_stage_duration_seconds_sum", {**stage, "stage": "infer"}) == pytest.approx(0.5 * count)
        assert get("usagi_stage_duration_seconds_sum", {**stage, "stage": "queue"}) == pytest.approx(queued)
    assert calls[2].answered_by == {"model": "m", "version": "1", "variant": "fp32", "batch": 3}


def test_gauges_end_with_the_variant_and_counters_stay(telemetry):
    observer = run_once(telemetry, "1")
    assert (
        telemetry.registry.get_sample_value(
            "usagi_queue_depth", dict(zip(("model", "version", "variant"), observer.labels, strict=True))
        )
        == 3
    )
    telemetry.forget(*observer.labels)
    for gauge in ("usagi_queue_depth", "usagi_model_info", "usagi_model_bytes", "usagi_model_load_seconds"):
        assert not series(telemetry, gauge), gauge
    assert len(series(telemetry, "usagi_batch_size_count")) == 1


def test_a_thousand_versions_leave_a_bounded_number_of_series(telemetry):
    for version in range(1000):
        telemetry.forget(*run_once(telemetry, str(version)).labels)
    for name in (
        "usagi_batch_size_count",
        "usagi_batch_duration_seconds_count",
        "usagi_rejected_total",
        "usagi_dropped_total",
    ):
        assert len(series(telemetry, name)) == KEPT_SERIES, name
    assert len(series(telemetry, "usagi_stage_duration_seconds_count")) == KEPT_SERIES * 2  # queue and infer


def test_a_variant_that_returns_keeps_counting(telemetry):
    telemetry.forget(*run_once(telemetry, "1").labels)
    run_once(telemetry, "1")
    for version in range(2, 2 + KEPT_SERIES):
        telemetry.forget(*run_once(telemetry, str(version)).labels)
    labels = {"model": "m", "version": "1", "variant": "fp32"}
    assert telemetry.registry.get_sample_value("usagi_batch_size_count", labels) == 2, "it is in memory, so it stays"


def test_calls_are_counted_by_code_and_none_stays_in_flight(telemetry):
    method = telemetry.method("/a/One")
    for code in ("OK", "OK", "NOT_FOUND"):
        method.begin((("x-request-id", "one"),)).finish(code)
    get = telemetry.registry.get_sample_value
    labels = {"service": "test", "method": "/a/One"}
    assert get("usagi_requests_total", {**labels, "code": "OK"}) == 2
    assert get("usagi_requests_total", {**labels, "code": "NOT_FOUND"}) == 1
    assert get("usagi_request_duration_seconds_count", labels) == 3
    assert get("usagi_inflight_requests", {"service": "test"}) == 0
