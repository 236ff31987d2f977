"""Loads every domain through the gateway and judges the result.

    .venv/bin/locust -f tests/load/locustfile.py --headless -u 4 -r 2 -t 10s --host 127.0.0.1:8080

The users stand in `services/<domain>/load.py`. At the end the objectives decide the exit code: no errors, and the 95th
percentile of every kind of call at most USAGI_LOAD_P95_MS. Users pace themselves (closed loop): the report says what
was achieved, not what would be offered.
"""

import grpc.experimental.gevent as grpc_gevent

grpc_gevent.init_gevent()  # before any channel exists

import importlib  # noqa: E402
import importlib.util  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402
from typing import Any  # noqa: E402

from locust import events  # noqa: E402
from locust.runners import WorkerRunner  # noqa: E402

from shared.client.load import GrpcUser  # noqa: E402
from shared.services_table import load_table  # noqa: E402

P95_LIMIT_MS = float(os.environ.get("USAGI_LOAD_P95_MS", "250"))
BUSY_SHARE = 0.9
"""Above this share of one core locust itself is the bottleneck, and its times are not the server's."""
ENOUGH_CALLS = 20
"""Fewer calls have no 95th percentile to speak of."""

log = logging.getLogger("usagi.load")
_started = {"wall": 0.0, "cpu": 0.0}


def _users() -> dict[str, type[GrpcUser]]:
    """The users of all domains, by class name; locust takes those that it finds in this module."""
    found: dict[str, type[GrpcUser]] = {}
    for domain in load_table().services:
        if importlib.util.find_spec(f"services.{domain}.load") is None:
            continue
        module = importlib.import_module(f"services.{domain}.load")
        found.update(
            (name, value)
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, GrpcUser) and value is not GrpcUser
        )
    if not found:
        raise RuntimeError("no services/<domain>/load.py defines a locust user")
    return found


globals().update(_users())


@events.test_start.add_listener
def note_start(**_: Any) -> None:
    """Remembers the clocks."""
    _started.update(wall=time.perf_counter(), cpu=time.process_time())


@events.quitting.add_listener
def judge(environment: Any, **_: Any) -> None:
    """Sets the exit code by the objectives."""
    if isinstance(environment.runner, WorkerRunner):
        return
    wall = time.perf_counter() - _started["wall"]
    share = (time.process_time() - _started["cpu"]) / wall
    total = environment.stats.total
    log.info("%d calls, %.1f/s, locust used %.0f%% of a core", total.num_requests, total.total_rps, 100 * share)
    if share > BUSY_SHARE:
        log.warning("locust was busy: its times are too long; use --processes or fewer users")
    problems = _broken_objectives(environment.stats)
    for problem in problems:
        log.error("objective missed: %s", problem)
    environment.process_exit_code = 1 if problems else 0


def _broken_objectives(stats: Any) -> list[str]:
    problems = []
    if stats.total.num_requests == 0:
        problems.append("no call was made")
    if stats.total.num_failures:
        problems.append(f"{stats.total.num_failures} of {stats.total.num_requests} calls failed, expected none")
    for (name, _), row in sorted(stats.entries.items()):
        p95 = row.get_response_time_percentile(0.95)
        if row.num_requests >= ENOUGH_CALLS and p95 > P95_LIMIT_MS:
            problems.append(f"{name}: 95th percentile {p95:.0f} ms, expected at most {P95_LIMIT_MS:.0f} ms")
    return problems
