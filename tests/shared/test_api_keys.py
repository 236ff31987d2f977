"""The file of the API keys, and what else knows of them."""

import stat
from pathlib import Path

import pytest

from shared.api_keys import KeyFile, bearer_of, find_key, make_key, new_secret, parse_keys, parse_rate
from shared.client.connection import Connection
from shared.errors import ConfigurationError, InvalidInput
from shared.roles import ADMIN_METHODS

ROOT = Path(__file__).parents[2]
HASH = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
"""SHA-256 of `test`, as `printf test | sha256sum` prints it."""


def test_a_line_is_a_key():
    alice, root = parse_keys(f"# comment\n\nalice infer {HASH} 600/min\nroot admin {'0' * 64}\n")
    assert (alice.name, alice.role, alice.sha256) == ("alice", "infer", HASH)
    assert (alice.rate.calls, alice.rate.seconds) == (600, 60)
    assert root.rate is None
    assert parse_keys(f"{alice}\n{root}\n") == (alice, root)
    assert find_key((alice, root), "test") is alice
    for wrong in ("", "Test", "x" * 10_000, HASH):
        assert find_key((alice, root), wrong) is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("alice infer", "expected: name, role, SHA-256"),
        (f"alice infer {HASH[:-1]}", "expected: name, role, SHA-256"),
        (f"alice infer {HASH.upper()}", "expected: name, role, SHA-256"),
        (f"alice infer {HASH} 1/s 2/s", "expected: name, role, SHA-256"),
        (f"alice king {HASH}", "role: is 'king', expected infer or admin"),
        (f"Alice infer {HASH}", "name: is 'Alice'"),
        (f"(catalog) infer {HASH}", "name: is '(catalog)'"),
        (f"alice infer {HASH} 0/s", "rate: is '0/s'"),
        (f"alice infer {HASH} 5/day", "rate: is '5/day'"),
        (f"bob infer {'0' * 64}", "'bob' stands there twice"),
        (f"carol infer {'0' * 64}", "'carol' has the hash of another"),
    ],
)
def test_a_wrong_line_is_named(line, said):
    with pytest.raises(ConfigurationError) as caught:
        parse_keys(f"bob infer {'0' * 64}\n{line}\n", "keys")
    assert caught.value.message.startswith("keys, line 2: ")
    assert said in caught.value.message
    assert HASH not in caught.value.message


def test_what_the_header_holds():
    assert bearer_of("Bearer x") == bearer_of("bEARER x") == "x"
    assert bearer_of("Basic x") == bearer_of("x") == bearer_of("") == ""


def test_secrets_are_long_and_different():
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert {len(secret) for secret in secrets} == {49}, "256 bits as base64, and the prefix"


@pytest.mark.parametrize(("name", "role"), [("", "infer"), ("a b", "infer"), ("x" * 64, "infer"), ("a", "root")])
def test_names_and_roles_that_are_none(name, role):
    with pytest.raises(InvalidInput):
        make_key(name, role, "secret")
    with pytest.raises(InvalidInput):
        parse_rate("many")


def test_the_file_is_replaced_whole_and_is_its_owners_alone(tmp_path):
    file = KeyFile(tmp_path / "deep" / "keys")
    assert not file.exists()
    assert file.signature() is None
    file.save([make_key("alice", "infer", "one")])
    before, inode = file.signature(), file.path.stat().st_ino
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    file.save([make_key("alice", "infer", "two")])
    assert file.signature() != before
    assert file.path.stat().st_ino != inode, "a reader of the old one reads on"
    assert [path.name for path in file.path.parent.iterdir()] == ["keys"]


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path):
    folder = KeyFile(tmp_path)
    with pytest.raises(ConfigurationError, match=str(tmp_path)):
        folder.load()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        KeyFile(tmp_path / "file" / "keys").save([])
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="no UTF-8"):
        KeyFile(tmp_path / "bytes").load()


def test_the_client_sends_its_key(monkeypatch):
    monkeypatch.setenv("USAGI_KEY", "from-environment")
    with Connection("localhost:1") as connection:
        assert ("authorization", "Bearer from-environment") in connection.metadata
    with Connection("localhost:1", key="given") as connection:
        assert ("authorization", "Bearer given") in connection.metadata
    with Connection("localhost:1", key="") as connection:
        assert connection.metadata == ()


def test_every_method_that_says_so_needs_admin():
    """The protos' comments are what people read."""
    text = (ROOT / "protos/usagi/model/v1/model_service.proto").read_text()
    said = [
        line.split("rpc ")[1].split("(")[0]
        for before, line in zip(text.splitlines(), text.splitlines()[1:], strict=False)
        if "Needs the admin role" in before
    ]
    mine = [method for method in ADMIN_METHODS if method.startswith("/usagi.model.v1.ModelService/")]
    assert [f"/usagi.model.v1.ModelService/{name}" for name in said] == mine
    oip = (ROOT / "protos/inference/open_inference_grpc.proto").read_text()
    for name in ("RepositoryModelLoad", "RepositoryModelUnload"):
        assert f"rpc {name}(" in oip
        assert f"/inference.GRPCInferenceService/{name}" in ADMIN_METHODS
