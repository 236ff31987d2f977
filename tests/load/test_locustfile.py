"""The load test itself: it passes on a sound stack, and fails when calls fail or come too late."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.client.local import local_stack

ROOT = Path(__file__).parents[2]
NOBODY = "127.0.0.1:9"  # the discard port: nothing listens there


def run_locust(target, seconds=5, **variables):
    command = [sys.executable, "-m", "locust", "-f", "tests/load/locustfile.py", "--headless", "--only-summary"]
    return subprocess.run(
        [*command, "-u", "4", "-r", "4", "-t", f"{seconds}s", "--host", target],
        cwd=ROOT,
        env={**os.environ, "USAGI_LOAD_P95_MS": "2000", **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    with local_stack(tmp_path_factory.mktemp("logs"), free_ports=True) as stack:
        yield stack.target


def test_a_sound_stack_meets_the_objectives(target):
    done = run_locust(target)
    assert done.returncode == 0, done.stdout + done.stderr
    for row in ("ClassifyImage auto", "ClassifyImage fp32", "ClassifyImage truncated", "ListModels"):
        assert f"vision/{row}" in done.stderr
    assert "% of a core" in done.stderr


def test_slow_answers_miss_the_objective(target):
    done = run_locust(target, USAGI_LOAD_P95_MS="0.1")
    assert done.returncode == 1, done.stderr
    assert "95th percentile" in done.stderr


def test_failed_calls_miss_the_objective():
    done = run_locust(NOBODY, seconds=2)
    assert done.returncode == 1, done.stderr
    assert "calls failed, expected none" in done.stderr
