"""Every fenced command of the README is executed, in order, and its sentences about the tree hold."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from shared.client.local import local_stack

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# These run this test, or run in tests/e2e on the real engine: running them here would run them twice.
ELSEWHERE = {
    "make test": "this test suite",
    "make demo": "tests/e2e/test_demo.py",
    "make local": "the stack that this module starts is the same",
    "make up": "tests/e2e/test_compose.py",
    "make down": "tests/e2e/test_compose.py",
    "make load": "tests/e2e/test_compose.py",
    "make verify": ".ci/run",
    "make lint": ".ci/run",
}


def fenced_commands():
    for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", README, re.S):
        joined = block.replace("\\\n", " ")
        for line in joined.splitlines():
            command = line.split("  #")[0].strip().removeprefix("$ ")
            if command and not command.startswith("#"):
                yield command


COMMANDS = list(dict.fromkeys(fenced_commands()))


def test_readme_has_commands():
    assert {"make demo", "make test"} <= set(COMMANDS)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    with local_stack(tmp_path_factory.mktemp("logs"), free_ports=True) as stack:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        yield {**os.environ, "USAGI_TARGET": stack.target, "PATH": path}


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ELSEWHERE])
def test_command_runs(command, environment):
    command = command.replace("127.0.0.1:8080", environment["USAGI_TARGET"])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert done.stdout.strip(), "a command of the README shows something"


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_make_targets_exist(command):
    for word in shlex.split(command)[1:]:
        if "=" not in word:
            assert re.search(rf"^{re.escape(word)}:.*## ", (ROOT / "Makefile").read_text(), re.M), word


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
