"""The measurements themselves: one server under one load, the order of a repeat, and the search for a rate.

A measured window begins after a warm-up of the same load, sends a fixed number of calls, and counts the CPU of the
server's whole process tree by the kernel's clock of each process.
"""

from __future__ import annotations

import math
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import numpy as np
from inference import open_inference_grpc_pb2 as pb

from shared.errors import UsagiError
from tests.benchmarks.calls import GRPC, Call
from tests.benchmarks.generators import Load, Outcome, has_h2load, run_grpc, run_h2load
from tests.benchmarks.models import BenchModel
from tests.benchmarks.processes import cpu_seconds, memory_mb
from tests.benchmarks.raw import BATCHES, RawModel
from tests.benchmarks.rows import Row, row
from tests.benchmarks.servers import Server

TOLERANCE = 1e-4
"""Of float32 answers: ONNX Runtime may add up in another order in another batch."""
REPLY_SPREAD = 2.0
"""Bytes by which the mean reply may differ from the checked one: the batch's size is in it, one or two bytes long."""
PILOT_SECONDS = 0.4
OPEN_INFLIGHT = 256


class WrongAnswer(UsagiError):
    """A server answered something else than ONNX Runtime, or not every call."""


@dataclass(frozen=True)
class Settings:
    """How long a window is, and what sends the calls: `h2load`, `grpc`, or `auto` for h2load where it is installed."""

    seconds: float = 2.0
    generator: str = "auto"

    def run(self, call: Call, load: Load) -> Outcome:
        """Sends the calls."""
        h2load = self.generator == "h2load" or (self.generator == "auto" and has_h2load())
        return run_h2load(call, load) if h2load or call.protocol != GRPC else run_grpc(call, load)


def checked_reply(call: Call, expected: np.ndarray) -> int:
    """Sends one call and compares its answer; the reply's bytes.

    Raises:
        WrongAnswer: it is another one.
    """
    if call.protocol == GRPC:
        with grpc.insecure_channel(call.target) as channel:
            reply = channel.unary_unary(call.path)(call.body, metadata=tuple(call.headers.items()), timeout=60)
        raw = pb.ModelInferResponse.FromString(reply).raw_output_contents[0]
    else:
        with urllib.request.urlopen(f"http://{call.target}{call.path}", call.body, timeout=60) as answered:
            reply = raw = answered.read()
    answer = np.frombuffer(raw, np.float32)
    if not np.allclose(answer, expected.ravel(), rtol=TOLERANCE, atol=TOLERANCE):
        raise WrongAnswer(f"{call.target} answers {answer[:3]}…, ONNX Runtime {expected.ravel()[:3]}…")
    return len(reply)


@dataclass
class Probe:
    """Measures one model of one server; remembers how fast it is, to choose how many calls to send."""

    server: Server
    model: BenchModel
    call: Call
    expected: np.ndarray
    settings: Settings
    _rates: dict[int, float] | None = None
    _reply: int = 0

    def closed(self, inflight: int) -> Row:
        """`inflight` calls at a time."""
        self._warm(inflight)
        assert self._rates is not None
        count = max(2 * inflight, math.ceil(self._rates[inflight] * self.settings.seconds))
        measured = self._measure(Load(count, inflight), f"{inflight} in flight")
        self._rates[inflight] = measured.items_per_second
        return measured

    def open(self, rate: float) -> Row:
        """`rate` calls a second, whatever the server does."""
        self._warm(8)
        count = max(20, math.ceil(rate * self.settings.seconds))
        return self._measure(Load(count, OPEN_INFLIGHT, rate), f"{rate:.0f} a second")

    def _warm(self, inflight: int) -> None:
        """The check, and a first run of the same load, from which the rate is known."""
        if self._rates is None:
            self._rates = {}
            self._reply = checked_reply(self.call, self.expected)
        if inflight not in self._rates:
            rate, count = 0.0, 2 * inflight
            for _ in range(4):
                outcome = self.settings.run(self.call, Load(count, inflight))
                rate = outcome.succeeded / outcome.seconds
                if outcome.seconds > PILOT_SECONDS / 2:
                    break
                count = math.ceil(max(rate, 2 * inflight) * PILOT_SECONDS)
            self._rates[inflight] = rate

    def _measure(self, load: Load, words: str) -> Row:
        sums, before = self.server.sums(), cpu_seconds(self.server.processes)
        outcome = self.settings.run(self.call, load)
        used = cpu_seconds(self.server.processes) - before
        after = self.server.sums()
        grown = {name: value - sums.get(name, 0.0) for name, value in after.items()}
        self._check(outcome, grown)
        return row(
            self.server.name, self.model.name, words, outcome.succeeded, outcome.seconds, used, outcome.latencies,
            inflight=load.inflight, rate=load.rate, errors=outcome.failed, stages=stage_milliseconds(grown),
            client_cpu=outcome.cpu_seconds / outcome.seconds, memory_mb=memory_mb(self.server.processes),
        )  # fmt: skip

    def _check(self, outcome: Outcome, grown: dict[tuple[str, str], float]) -> None:
        """The server's own count of OK, and the size of the replies: h2load does not see grpc-status."""
        failed = sum(
            value for (name, code), value in grown.items() if name == "usagi_requests_total" and code not in ("", "OK")
        )
        if failed:
            raise WrongAnswer(f"{self.server.name} failed {failed:.0f} calls of {self.model.name}")
        if self._reply and outcome.succeeded and abs(outcome.reply_bytes - self._reply) > REPLY_SPREAD:
            raise WrongAnswer(f"replies have {outcome.reply_bytes:.1f} bytes, the checked one {self._reply}")


def stage_milliseconds(grown: dict[tuple[str, str], float]) -> dict[str, float]:
    """Mean milliseconds of a request in each stage, and in all, from the growth of the histograms."""
    names = {"usagi_stage_duration_seconds": None, "usagi_request_duration_seconds": "call"}
    stages: dict[str, float] = {}
    for (name, stage), value in grown.items():
        metric, _, kind = name.rpartition("_")
        count = grown.get((f"{metric}_count", stage), 0.0)
        if metric in names and kind == "sum" and count:
            stages[names[metric] or stage] = 1000 * value / count
    return stages


def one_repeat(
    probes: list[Probe], raws: dict[str, RawModel], inflights: list[int], seconds: float
) -> Iterator[Callable[[], Row]]:
    """The measurements of one repeat: for each model raw first, then every server under every load."""
    models = list(dict.fromkeys(probe.model.name for probe in probes)) or list(raws)
    for name in models:
        raw = raws[name]
        for batch in BATCHES:
            yield lambda raw=raw, batch=batch: raw.measure(batch, seconds / 2)
        yield lambda raw=raw: raw.lonely(seconds / 4)
        for inflight in inflights:
            for probe in probes:
                if probe.model.name == name:
                    yield lambda probe=probe, inflight=inflight: probe.closed(inflight)


@dataclass(frozen=True)
class Objective:
    """A promise to keep: `p99=50ms`."""

    percentile: str
    milliseconds: float

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Reads `p99=50ms`.

        Raises:
            ValueError: something else.
        """
        percentile, _, value = text.partition("=")
        if percentile not in ("p50", "p95", "p99") or not value.endswith("ms") or float(value[:-2]) <= 0:
            raise ValueError(f"`{text}` is no objective, expected such as p99=50ms (p50, p95 or p99)")
        return cls(percentile, float(value[:-2]))

    def holds(self, measured: Row) -> bool:
        """Whether it was kept: in time, without errors, and at the rate that was asked for."""
        latency: float = getattr(measured, f"{self.percentile}_ms")
        return (
            latency <= self.milliseconds and not measured.errors and measured.items_per_second >= 0.95 * measured.rate
        )


def highest_rate(probe: Probe, objective: Objective, steps: int = 6) -> tuple[Row | None, list[Row]]:
    """The highest rate at which the objective holds, by halving the interval; with every rate that was tried."""
    full = probe.closed(32).items_per_second
    low, high, best, tried = 0.0, 1.2 * full, None, []
    rate = 0.7 * full
    for _ in range(steps):
        measured = probe.open(rate)
        tried.append(measured)
        if objective.holds(measured):
            low, best = rate, measured
        else:
            high = rate
        rate = (low + high) / 2
    return best, tried
