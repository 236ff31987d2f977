"""What both peers have in common; runs in a peer's own environment, so it imports nothing of ours."""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request


def open_session(path):
    """ONNX Runtime as Usagi sets it up: one thread, no spinning."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def free_port():
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as opened:
        return opened.getsockname()[1]


def graphs():
    """The graphs of the folder that the command names, by model."""
    return {path.stem: path.resolve() for path in sorted(pathlib.Path(sys.argv[1]).glob("*.onnx"))}


def wait_for(url, process, seconds=60):
    """Waits until a URL answers 200."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"the peer ended with {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"{url} does not answer")


def announce(name, models, processes):
    """Says where the models are, then waits for SIGTERM and ends the processes."""
    print(json.dumps({"name": name, "models": models}), flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        while all(process.poll() is None for process in processes):
            time.sleep(0.2)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
