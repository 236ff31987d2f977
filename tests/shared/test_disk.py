"""A disk that is really full or read-only: a small tmpfs in a mount namespace that ends with its process."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared.disk_scenarios import SCENARIOS

ROOT = Path(__file__).parents[2]
SIZE = "1m"
NAMESPACES = (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"])
"""As root, and as anybody where the kernel allows it."""


@functools.cache
def own_mounts():
    """The command that gives a process mounts of its own; None where neither way is allowed."""
    for command in NAMESPACES:
        trial = [*command, "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
        try:
            if subprocess.run(trial, capture_output=True, check=False).returncode == 0:
                return command
        except FileNotFoundError:
            return None
    return None


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_disk(tmp_path, scenario):
    if own_mounts() is None:
        pytest.skip("needs `unshare --mount`: root, or user namespaces")
    disk = tmp_path / "disk"
    disk.mkdir()
    inside = f'mount -t tmpfs -o size={SIZE} tmpfs "$1" && exec "$2" -m tests.shared.disk_scenarios "$3" "$1"'
    command = [*own_mounts(), "sh", "-c", inside, "sh", str(disk), sys.executable, scenario.__name__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert list(disk.iterdir()) == [], "the mount was the process's own"
