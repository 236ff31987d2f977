"""Prometheus metrics written without locks: for metrics that one thread alone writes, here the event loop's.

prometheus_client takes a lock and looks through the buckets for every observation, .7 µs of them; eight a call were a
tenth of a small call. Another thread that reads sees each number before or after an addition, as with locks. With
another kind of value than the client's plain one (its multiprocess mode) the client's own methods are used.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.values import MutexValue


def observer_of(histogram: Histogram) -> Callable[[float], None]:
    """What `observe` does, for one histogram with its labels set."""
    bounds, buckets, total = histogram._upper_bounds, histogram._buckets, histogram._sum
    if not isinstance(total, MutexValue):
        return histogram.observe

    def observe(amount: float) -> None:
        total._value += amount
        buckets[bisect_left(bounds, amount)]._value += 1.0

    return observe


def adder_of(metric: Counter | Gauge) -> Callable[[float], None]:
    """What `inc` does, for one counter or gauge with its labels set."""
    value = metric._value
    if not isinstance(value, MutexValue):
        return metric.inc

    def add(amount: float) -> None:
        value._value += amount

    return add
