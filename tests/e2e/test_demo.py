"""`make demo`, the way a newcomer sees it: real processes, real answers, pictures, and nothing left running."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from shared.services_table import load_table

ROOT = Path(__file__).parents[2]
USAGI = [sys.executable, "-m", "shared.client.cli"]


def running(pattern):
    return subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=False).stdout.split()


def test_demo_answers_draws_and_stops():
    picture_file = ROOT / "out/vision_classify.png"
    picture_file.unlink(missing_ok=True)
    before = set(running("services.vision.serving")) | set(running("services.gateway"))
    started = time.monotonic()
    environment = {**os.environ, "COLUMNS": "140"}
    done = subprocess.run(
        ["make", "demo"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("right") >= 6, f"of 8 photos at least 6 are recognised:\n{done.stdout}"
    assert "fp32" in done.stdout
    assert "int8" in done.stdout
    picture = cv2.imread(str(picture_file))
    assert picture is not None
    assert picture.std() > 20, "the picture shows something"
    assert min(picture.shape[:2]) > 400
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 1000
    assert set(running("services.vision.serving")) | set(running("services.gateway")) <= before
    assert seconds < 60, f"{seconds:.0f} s"


def test_cli_explains_itself():
    for arguments in (["--help"], ["vision", "--help"], ["vision", "classify", "--help"], ["models", "--help"]):
        done = subprocess.run([*USAGI, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
        assert "usage: usagi" in done.stdout


def test_nobody_at_the_target_is_said_in_one_line():
    sample = next((ROOT / "tests/data/flowers").glob("*.jpg"))
    done = subprocess.run(
        [*USAGI, "vision", "classify", str(sample), "--target", "127.0.0.1:9", "--timeout", "10"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "UNAVAILABLE" in done.stderr
    assert "make local" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_photo_is_said_before_any_call():
    done = subprocess.run(
        [*USAGI, "vision", "classify", "no-such.jpg"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "no-such.jpg is not a file" in done.stderr


def test_taken_port_is_said_before_anything_starts():
    port = load_table().gateway.port
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # somebody else may hold it already
            held.enter_context(socket.create_server(("127.0.0.1", port)))
        done = subprocess.run([*USAGI, "local"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"port {port} (gateway) is taken" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_the_command(tmp_path, number):
    """Even after kill -9: the kernel ends the children."""
    marker = f"usagi-test-{number}-{os.getpid()}"
    code = (
        "import pathlib, sys, time; from shared.client.local import _end_at_sigterm, local_stack; _end_at_sigterm()\n"
        "with local_stack(pathlib.Path(sys.argv[1]), free_ports=True):\n    print('up', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "USAGI_REPLICA": marker}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # a shell's background job, such as a CI's, begins with SIGINT ignored, and its children with it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == b"up\n"
    assert len(marked(marker)) >= 3, "the command, vision, the gateway"
    process.send_signal(number)
    process.wait(30)
    process.stdout.close()
    deadline = time.monotonic() + 10
    while marked(marker):
        assert time.monotonic() < deadline, marked(marker)
        time.sleep(0.05)


def marked(marker):
    """Processes whose environment holds the marker."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if marker.encode() in entry.read_bytes():
                found.append(entry.parent.name)
    return found
