"""Metrics written without locks say what prometheus_client would have said."""

import random

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shared.serving.fast_metrics import adder_of, observer_of


def samples(registry):
    return {
        (s.name, tuple(s.labels.items())): s.value
        for f in registry.collect()
        for s in f.samples
        if "created" not in s.name
    }


def test_histograms_counters_and_gauges_as_the_client_writes_them():
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    made = []
    for registry in (ours, theirs):
        histogram = Histogram("h", "h", ("m",), buckets=(0.5, 1, 2.5), registry=registry).labels("x")
        counter = Counter("c", "c", ("m",), registry=registry).labels("x")
        gauge = Gauge("g", "g", registry=registry)
        made.append((histogram, counter, gauge))
    observe, count, add = observer_of(made[0][0]), adder_of(made[0][1]), adder_of(made[0][2])
    rng = random.Random(1)
    for value in [0.0, 0.5, 1.0, 2.5, 2.6, 1e9, *(rng.uniform(0, 3) for _ in range(500))]:
        observe(value)
        made[1][0].observe(value)
        count(1)
        made[1][1].inc()
        add(-value)
        made[1][2].inc(-value)
    assert samples(ours) == samples(theirs)
    assert samples(ours)[("h_count", (("m", "x"),))] == 506
