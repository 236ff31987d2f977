"""How fast a variant is, on one thread of this CPU."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.training.metrics import Predict

BATCHES = (1, 2, 4, 8, 16, 32)
NEAR_BEST = 0.97
"""`max_batch` reaches this share of the best throughput; larger batches would cost latency and bring nothing."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds at batch 1, items a second by batch, and the batch that a server should not exceed."""

    p50_ms: float
    p95_ms: float
    throughput: dict[int, float]
    max_batch: int


def smallest_near_best(throughput: dict[int, float]) -> int:
    """The smallest batch within 3% of the best throughput."""
    best = max(throughput.values())
    return min(batch for batch, rate in throughput.items() if rate >= NEAR_BEST * best)


def measure_latencies(
    predictors: dict[str, Predict], example: NDArray[np.float32], *, rounds: int = 200, batch_rounds: int = 12
) -> dict[str, Latency]:
    """Measures several variants in turns, so that a disturbance of the machine hits all of them alike.

    Args:
        predictors: `predict` by variant.
        example: one input, `[1, ...]`.
        rounds: calls at batch 1 for the percentiles.
        batch_rounds: calls at each batch size; the fastest half counts, because other programs only ever slow one down.
    """
    single = _time_in_turns(predictors, example, rounds)
    rates: dict[str, dict[int, float]] = {name: {} for name in predictors}
    for batch in BATCHES:
        times = _time_in_turns(predictors, np.repeat(example, batch, axis=0), batch_rounds)
        for name, seconds in times.items():
            rates[name][batch] = batch / float(np.median(np.sort(seconds)[: max(1, len(seconds) // 2)]))
    return {
        name: Latency(
            p50_ms=1e3 * float(np.percentile(single[name], 50)),
            p95_ms=1e3 * float(np.percentile(single[name], 95)),
            throughput=rates[name],
            max_batch=smallest_near_best(rates[name]),
        )
        for name in predictors
    }


def _time_in_turns(
    predictors: dict[str, Predict], batch: NDArray[np.float32], rounds: int
) -> dict[str, NDArray[np.float64]]:
    seconds: dict[str, list[float]] = {name: [] for name in predictors}
    for predict in predictors.values():
        predict(batch)
        predict(batch)
    for _ in range(rounds):
        for name, predict in predictors.items():
            started = time.perf_counter()
            predict(batch)
            seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values) for name, values in seconds.items()}
