"""`usagi keys`, as the gateway's image has it."""

import os
import subprocess
import sys

from services.gateway.admission import round_constants
from shared.api_keys import KeyFile, digest
from tests.services.gateway.processes import ROOT


def keys(path, *arguments, check=True):
    command = [sys.executable, "-m", "services.gateway", "keys", *arguments]
    environment = {"USAGI_KEYS_FILE": str(path), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == check, done.stderr
    return done.stdout.strip() if check else done.stderr


def test_make_list_revoke(tmp_path):
    path = tmp_path / "keys"
    assert "no keys are set" in keys(path, "list")
    secret = keys(path, "make", "alice", "--role", "admin", "--rate", "5/min")
    assert secret.startswith("usagi_")
    (key,) = KeyFile(path).load()
    assert (key.name, key.role, str(key.rate), key.sha256) == ("alice", "admin", "5/min", digest(secret))
    assert keys(path, "list").split() == ["alice", "admin", "5/min"]
    assert secret not in path.read_text()
    assert "`revoke` it first" in keys(path, "make", "alice", check=False)
    assert "rate: is '5/day'" in keys(path, "make", "bob", "--rate", "5/day", check=False)
    assert "known: alice" in keys(path, "revoke", "bob", check=False)
    assert KeyFile(path).load() == (key,), "what fails changes nothing"
    assert "nobody comes in" in keys(path, "revoke", "alice")
    assert KeyFile(path).load() == ()


def test_two_who_make_keys_at_once_lose_none(tmp_path):
    path = tmp_path / "keys"
    command = [sys.executable, "-m", "services.gateway", "keys", "make"]
    environment = {"USAGI_KEYS_FILE": str(path), "PATH": os.environ["PATH"]}
    names = [f"user-{number}" for number in range(4)]
    makers = [
        subprocess.Popen([*command, name], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) for name in names
    ]
    assert [maker.wait(30) for maker in makers] == [0] * len(names)
    assert sorted(key.name for key in KeyFile(path).load()) == names


def test_round_constants_are_those_of_the_standard():
    constants = round_constants()
    assert len(constants) == 64
    assert [constants[0], constants[1], constants[63]] == [0x428A2F98, 0x71374491, 0xC67178F2]
