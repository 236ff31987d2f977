"""What serving images install is locked by hash, and the locks are in step with pyproject.toml and constraints.txt."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = runpy.run_path(str(ROOT / "deploy/lock.py"))
IMAGES = LOCK["images"]()
ENTRY = re.compile(r"([a-z0-9.-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)")
AGAIN = "run: make lock"


def entries(name):
    """Version and hashes of every package of a lock; nothing else stands in it."""
    text = (ROOT / f"deploy/locks/{name}.lock").read_text(encoding="utf-8")
    first, _, body = text.partition("\n")
    assert first.startswith("# Made by `make lock`")
    found = {match[1]: (match[2], set(re.findall("[0-9a-f]{64}", match[3]))) for match in ENTRY.finditer(body)}
    assert "".join(match[0] + "\n" for match in ENTRY.finditer(body)) == body, "no index, no address, nothing unhashed"
    return found


def test_every_image_has_a_lock_and_no_other():
    assert {path.stem for path in (ROOT / "deploy/locks").glob("*.lock")} == set(IMAGES), AGAIN


def wanted(extras):
    listing = [sys.executable, "-I", "-S", "deploy/docker/requirements.py", *extras]
    lines = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("image", IMAGES)
def test_locks_are_in_step(image):
    locked = entries(image)
    for requirement in wanted(IMAGES[image]):
        if requirement.marker and not requirement.marker.evaluate(default_environment()):
            continue
        version, _ = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is locked to {version}; {AGAIN}"
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line and line[0] != "#"]
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for name, (version, hashes) in locked.items():
        assert pinned.get(name, version) == version, f"{name}: constraints.txt says otherwise; {AGAIN}"
        assert 1 <= len(hashes) <= len(LOCK["processors"](image))
    assert not {"torch", "onnx", "pip"} & set(locked)


def test_the_images_install_from_them():
    text = (ROOT / "deploy/docker/service.Dockerfile").read_text()
    for target in ("serve", "gateway", "load"):
        block = re.search(rf"AS {target}-packages\n(.*?)\n\n", text, re.DOTALL)[1]
        assert "COPY deploy/locks/" in block
        assert re.search(r"install\.sh \w+\.lock$", block)
    assert "*.lock) hashes=--require-hashes" in (ROOT / "deploy/docker/install.sh").read_text()


def test_processors_must_agree():
    merge = LOCK["merge"]
    assert merge([{"a": ("1", {"x"})}, {"a": ("1", {"y"})}]) == {"a": ("1", {"x", "y"})}
    with pytest.raises(SystemExit, match="a is 1 for one processor and 2 for another"):
        merge([{"a": ("1", {"x"})}, {"a": ("2", {"y"})}])
