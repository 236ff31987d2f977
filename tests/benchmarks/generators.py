"""Load generators: processes of their own, whose CPU is counted apart from the server's.

h2load costs a few microseconds a call, so that what is measured is the server; it sees HTTP alone, so the bytes of the
replies are compared and the server's own count of OK is asked (suite.py). `grpc_load.py` is a grpc.aio client for
what h2load cannot do: streams, schedules, grpc-status. Both send a fixed number of calls, since a fixed time would cost
the server the CPU of calls that are thrown away at its end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.errors import ConfigurationError
from tests.benchmarks.calls import GRPC, Call

CONNECTIONS = 4
"""At most; the calls in flight are spread over them."""
MISSING = "h2load is missing: apt-get install nghttp2-client (or --generator grpc, which costs the machine more)"
_DATA = re.compile(r"\((\d+)\) data")
_REQUESTS = re.compile(r"requests: (\d+) total.* (\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout")
_FINISHED = re.compile(r"finished in ([\d.]+)(us|ms|s|m|h)")
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Load:
    """How much: closed loop with `inflight` calls, or open loop with `rate` calls a second and at most that many."""

    count: int
    inflight: int
    rate: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a generator saw; times in seconds, `reply_bytes` the mean body of a reply without gRPC's frame."""

    succeeded: int
    failed: int
    seconds: float
    latencies: np.ndarray
    cpu_seconds: float
    reply_bytes: float


def has_h2load() -> bool:
    """Whether h2load is installed."""
    return shutil.which("h2load") is not None


def run_h2load(call: Call, load: Load) -> Outcome:
    """Sends `load.count` calls with h2load.

    Raises:
        ConfigurationError: h2load is missing or did not understand.
    """
    if not has_h2load():
        raise ConfigurationError(MISSING)
    http1 = call.protocol != GRPC
    clients = load.inflight if http1 else min(CONNECTIONS, load.inflight)
    with tempfile.TemporaryDirectory() as folder:
        body, log = Path(folder) / "body", Path(folder) / "log"
        body.write_bytes(call.framed())
        command = ["h2load", "--requests", str(load.count), "--clients", str(clients), "--data", str(body)]
        command += ["--max-concurrent-streams", "1" if http1 else str(-(-load.inflight // clients))]
        command += ["--log-file", str(log), "--threads", "1"]
        command += ["--h1"] if http1 else ["--header", "te: trailers", "--header", "content-type: application/grpc"]
        if load.rate:
            command += ["--rps", f"{load.rate / clients:.3f}"]
        for name, value in call.headers.items():
            command += ["--header", f"{name}: {value}"]
        text, used = _run([*command, f"http://{call.target}{call.path}"])
        return parse_h2load(text, log.read_text(encoding="ascii"), used, framed=not http1)


def parse_h2load(text: str, log: str, used: float, *, framed: bool) -> Outcome:
    """Reads h2load's report and its log of requests: start in µs, HTTP status, µs.

    Raises:
        ConfigurationError: not the report of a run.
    """
    requests, data, finished = _REQUESTS.search(text), _DATA.search(text), _FINISHED.search(text)
    if not (requests and data and finished):
        raise ConfigurationError(f"h2load did not run: {text.strip()[-300:]}")
    total, succeeded = int(requests[1]), int(requests[2])
    latencies = np.array([int(line.split("\t")[2]) for line in log.splitlines()], dtype=np.float64) / 1e6
    seconds = float(finished[1]) * _UNITS[finished[2]]
    reply = int(data[1]) / max(1, succeeded) - (5 if framed else 0)
    return Outcome(succeeded, total - succeeded, seconds, latencies, used, reply)


def run_grpc(call: Call, load: Load, *, stream: bool = False) -> Outcome:
    """Sends the calls with grpc.aio; with `stream`, as messages of one stream for each call in flight."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "call.json"
        call.dump(written)
        command = [sys.executable, "-m", "tests.benchmarks.grpc_load", str(written)]
        command += ["--count", str(load.count), "--inflight", str(load.inflight), "--rate", str(load.rate)]
        text, _ = _run([*command, *(["--stream"] if stream else [])])
    answer = json.loads(text.splitlines()[-1])
    return Outcome(**{**answer, "latencies": np.array(answer["latencies"])})


def _run(command: list[str]) -> tuple[str, float]:
    """Output and CPU seconds of a process."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="replace")
    if process.returncode != 0:
        raise ConfigurationError(f"{command[0]} ended with {process.returncode}: {text.strip()[-500:]}")
    return text, usage.ru_utime + usage.ru_stime
