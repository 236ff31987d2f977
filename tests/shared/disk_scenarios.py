"""What happens on a disk that is full or read-only; test_disk.py runs each on a small disk of its own.

`python -m tests.shared.disk_scenarios NAME FOLDER`: FOLDER is the mount point of a tmpfs that this process alone sees.
"""

import contextlib
import errno
import json
import logging
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc

from shared.artifacts import publish, read_manifest, write_atomically
from shared.logs import JsonFormatter
from shared.serving.config import ServingConfig
from shared.testing.graphs import publish_affine
from shared.testing.server import running_server

BLOCK = 4096


def infer(stub, version=""):
    request = pb.ModelInferRequest(model_name="affine", model_version=version)
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(np.ones(4, np.float32).tobytes())
    answer = stub.ModelInfer(request, timeout=20)
    return answer.model_version, float(np.frombuffer(answer.raw_output_contents[0], np.float32)[0])


def index(stub):
    return {
        int(entry.version): (entry.state, entry.reason)
        for entry in stub.RepositoryIndex(pb.RepositoryIndexRequest()).models
    }


def wait_until(condition, seconds=20):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


def fill(folder, leave=0):
    """Fills the disk but for `leave` bytes."""
    filler = folder / "filler"
    room = shutil.disk_usage(folder).free - leave
    with filler.open("wb") as file:
        for _ in range(max(0, room // BLOCK)):
            file.write(bytes(BLOCK))
    return filler


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def remount(folder, how):
    subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)


@contextlib.contextmanager
def failing(number, place):
    """What the block does must fail with that errno and name the place."""
    with pytest.raises(OSError, match=re.escape(str(place))) as caught:
        yield
    assert caught.value.errno == number


def full_model_root(disk):
    """Publishing fails and leaves nothing; a copy that was cut short is named; everything else serves on."""
    root = disk / "models"
    first = publish_affine(root, scale=1.0)
    shutil.rmtree(root / ".measure")
    manifest = read_manifest(first)
    graph = (first / "model.onnx").read_bytes()
    config = ServingConfig(model_roots=(root,), rescan_seconds=0.05, threads=1)
    log = Log()
    with running_server("test", config) as running, grpc.insecure_channel(running.address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        assert infer(stub) == ("1", 1.0)
        filler = fill(disk, leave=BLOCK)
        before = listing(root)
        second = type(manifest)(**{**vars(manifest), "version": 2})
        target = root / "test/affine/2"
        with failing(errno.ENOSPC, target):
            publish(root, second, lambda folder: (folder / "model.onnx").write_bytes(graph * 50))
        assert listing(root) == before, "no part stays"
        with failing(errno.ENOSPC, root / "note"):
            write_atomically(root / "note", bytes(10 * BLOCK))
        assert listing(root) == before
        assert infer(stub) == ("1", 1.0)
        # what `cp` leaves of a version when the disk is full: the manifest, and an empty graph
        filler.unlink()
        filler = fill(disk, leave=2 * BLOCK)
        target.mkdir()
        (target / "manifest.json").write_text(second.to_json())
        (target / "model.onnx").touch()
        wait_until(lambda: 2 in index(stub))
        assert infer(stub) == ("1", 1.0)
        state, reason = index(stub)[2]
        assert state == "UNAVAILABLE"
        assert "model.onnx is not the file of its manifest: it has 0 bytes" in reason, reason
        assert any(entry["message"] == "model failed" and "0 bytes" in entry["reason"] for entry in log.entries())
        filler.unlink()
        publish_affine(root, version=2, scale=2.0)
        wait_until(lambda: index(stub).get(2, ("", ""))[0] == "READY")
        assert infer(stub) == ("2", 2.0)


def read_only_model_root(disk):
    """Publishing fails with the cause; what is there serves, also what is loaded only now; after that it goes on."""
    root = disk / "models"
    for version in (1, 2):
        publish_affine(root, version=version, scale=version)
    remount(disk, "ro")
    config = ServingConfig(model_roots=(root,), rescan_seconds=0.05, threads=1)
    with running_server("test", config) as running, grpc.insecure_channel(running.address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        manifest = read_manifest(root / "test/affine/1")
        third = type(manifest)(**{**vars(manifest), "version": 3})
        with failing(errno.EROFS, root / "test/affine"):
            publish(root, third, lambda folder: None)
        assert infer(stub) == ("2", 2.0)
        assert infer(stub, "1") == ("1", 1.0)
        assert {state for state, _ in index(stub).values()} == {"READY"}
        remount(disk, "rw")
        publish_affine(root, version=3, scale=3.0)
        wait_until(lambda: infer(stub) == ("3", 3.0))


def full_disk_of_the_log(disk):
    """The log file takes no more: calls are answered as before, and the log goes on when there is room."""
    publish_affine(disk / "models", scale=1.0)
    log = Log(disk / "server.log")
    logging.raiseExceptions = False  # as in a process whose stderr is full too
    config = ServingConfig(model_roots=(disk / "models",), threads=1)
    with running_server("test", config) as running, grpc.insecure_channel(running.address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        infer(stub)
        filler = fill(disk)
        for _ in range(200):
            assert infer(stub) == ("1", 1.0)
        assert log.path.stat().st_size < 200 * 100, "most of it was lost"
        filler.unlink()
        infer(stub)
        assert any(entry.get("method", "").endswith("ModelInfer") for entry in log.entries()[-1:])
        text = running.engine.telemetry.requests.labels("test", "/inference.GRPCInferenceService/ModelInfer", "OK")
        assert text._value.get() == 202


def full_disk_in_training(disk):
    """A checkpoint that finds no room is an error that says so, the last one is whole, and the run goes on from it."""
    import torch

    torch.set_num_threads(1)
    from shared.errors import ConfigurationError
    from shared.training.loop import Fit, FitConfig, Score

    class Batches:
        steps_per_epoch = 4

        def batch(self, epoch, step):
            generator = torch.Generator().manual_seed(epoch * 100 + step)
            inputs = torch.randn(8, 64, generator=generator)
            return inputs, inputs.sum(1, keepdim=True)

    def make(folder):
        torch.manual_seed(0)
        score = lambda model: Score(0.0, {})  # noqa: E731
        config = FitConfig(epochs=3, checkpoint_every=1)
        return Fit(torch.nn.Linear(64, 1), Batches(), torch.nn.functional.mse_loss, score, config, folder)

    whole = make(disk / "whole")
    whole.run()
    expected = {name: value.clone() for name, value in whole.model.state_dict().items()}
    shutil.rmtree(disk / "whole")
    fit = make(disk / "run")
    saves, save = [], fit._save

    def save_until_full():
        if len(saves) == 5:
            fill(disk)
        saves.append(fit.progress.step)
        save()

    fit._save = save_until_full
    with pytest.raises(ConfigurationError, match=r"last\.pt .* cannot be written: No space left on device"):
        fit.run()
    assert [path for path in listing(disk / "run") if path.startswith(".")] == []
    (disk / "filler").unlink()
    resumed = make(disk / "run")
    resumed.run()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), "bit by bit what it would have been"


class Log:
    """JSON lines of all loggers, in a file; beside the disk unless said otherwise."""

    def __init__(self, path=None):
        self.path = path or Path(sys.argv[2]).parent / "scenario.log"
        self._stream = self.path.open("w", buffering=1)
        handler = logging.StreamHandler(self._stream)
        handler.setFormatter(JsonFormatter(service="test"))
        logging.basicConfig(level="INFO", handlers=[handler], force=True)

    def entries(self):
        found = []
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # cut by the full disk
        return found


SCENARIOS = (full_model_root, read_only_model_root, full_disk_of_the_log, full_disk_in_training)

if __name__ == "__main__":
    {scenario.__name__: scenario for scenario in SCENARIOS}[sys.argv[1]](Path(sys.argv[2]))
