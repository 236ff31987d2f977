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
# Run word for word elsewhere: running them here would run them twice.
ELSEWHERE = {
    "make test": ".ci/run",  # it runs this very test
    "make demo": "tests/e2e/test_demo.py",
    "make up": "tests/e2e/conftest.py",
    "make down": "tests/e2e/conftest.py",
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
    assert set(ELSEWHERE) <= set(COMMANDS)


@pytest.mark.parametrize("command", sorted(ELSEWHERE))
def test_the_other_commands_run_where_it_is_said(command):
    text = (ROOT / ELSEWHERE[command]).read_text(encoding="utf-8")
    assert command in text or ", ".join(f'"{word}"' for word in command.split()) in text


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


def test_the_python_block_runs(environment):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    program = block.replace("127.0.0.1:8080", environment["USAGI_TARGET"])
    assert program != block
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "daisy"


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_make_targets_exist(command):
    for word in shlex.split(command)[1:]:
        if "=" not in word:
            assert re.search(rf"^{re.escape(word)}:.*## ", (ROOT / "Makefile").read_text(), re.M), word


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
