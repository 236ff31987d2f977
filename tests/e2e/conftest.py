"""The compose stack, built and started once for all tests of it."""

import shutil
import subprocess

import pytest

from tests.e2e.stack import ComposeStack


def engine_problem():
    """Why the containers cannot be tested here; empty if they can."""
    if shutil.which("docker") is None:
        return "there is no docker command"
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if result.returncode:
            return f"`{' '.join(command)}` fails: {result.stderr.strip()[:200]}"
    return ""


@pytest.fixture(scope="session")
def stack(request):
    """From `make up` to `make down`, as a project of its own; the logs are printed if any test failed."""
    problem = engine_problem()
    if problem:
        pytest.skip(f"needs a Docker engine with Compose v2: {problem}")
    stack = ComposeStack()
    failed_before = request.session.testsfailed
    try:
        stack.run("make", "up")
        yield stack
    finally:
        if request.session.testsfailed > failed_before:
            print(stack.compose("ps", "--all", check=False))
            print(stack.compose("logs", "--tail", "40", check=False))
        try:
            stack.run("make", "down")
            left = stack.compose("ps", "--all", "--quiet").split()
        finally:
            stack.remove()
    assert left == [], "`make down` leaves no container of its own"
