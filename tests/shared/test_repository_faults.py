"""The repository under cycles, rolling updates, policies, a memory bound, and disks that fail."""

import asyncio
import errno
import gc
import shutil
import subprocess
import sys
import threading
import time
import weakref

import grpc
import numpy as np
import pytest
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc

from shared.errors import ModelMemoryFull, ModelNotFound, ModelUnavailable
from shared.serving.batching import ComputePool
from shared.serving.config import ServingConfig
from shared.serving.memory import SessionMemory
from shared.serving.repository import ModelRepository, RepositoryOptions, State
from shared.serving.session import OnnxSession
from shared.serving.telemetry import Telemetry
from shared.testing.graphs import publish_affine
from shared.testing.server import running_server


def with_repository(root, test, *more_roots, open_session=OnnxSession, memory_limit=0):
    """Runs `test(repository)` on a repository over the roots, scanned once."""

    async def main():
        pool = ComputePool(1)
        options = RepositoryOptions(open_session=open_session, memory_limit=memory_limit)
        repository = ModelRepository("test", (root, *more_roots), pool, Telemetry("test", None), options)
        await repository.rescan()
        try:
            return await test(repository)
        finally:
            pool.close()

    return asyncio.run(asyncio.wait_for(main(), 60))


def states(repository, name="affine"):
    return {entry.version: entry.state for entry in repository.versions() if entry.name == name}


async def use(repository, version="", name="affine"):
    async with repository.acquire(name, version) as served:
        with served.batcher.admit():
            result = await served.batcher.submit({"x": np.ones((1, 4), np.float32)})
        return served.version, float(result.outputs["y"][0, 0])


READY, AVAILABLE, UNLOADED, FAILED = State.READY, State.AVAILABLE, State.UNLOADED, State.FAILED


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {1: AVAILABLE, 2: AVAILABLE, 3: READY}),
        ('versions = "all"', {1: AVAILABLE, 2: AVAILABLE, 3: READY}),
        ("versions = { latest = 1 }", {1: UNLOADED, 2: UNLOADED, 3: READY}),
        ("versions.latest = 2", {1: UNLOADED, 2: AVAILABLE, 3: READY}),
        ("versions = { specific = [1, 2, 9] }", {1: AVAILABLE, 2: READY, 3: UNLOADED}),
    ],
)
def test_policy_chooses_the_versions(tmp_path, text, expected):
    for version in (1, 2, 3):
        publish_affine(tmp_path, version=version, scale=version)
    if text:
        (tmp_path / "test/affine/model.toml").write_text(text)

    async def test(repository):
        assert states(repository) == expected
        newest = str(max(version for version, state in expected.items() if state is READY))
        assert await use(repository) == (newest, float(newest))

    with_repository(tmp_path, test)


def test_latest_counts_only_what_works_and_a_number_overrides(tmp_path):
    for version in (1, 2, 3):
        publish_affine(tmp_path, version=version, scale=version)
    (tmp_path / "test/affine/model.toml").write_text("versions = { latest = 1 }")
    (tmp_path / "test/affine/3/model.onnx").write_bytes(b"broken")

    async def test(repository):
        assert states(repository) == {1: UNLOADED, 2: READY, 3: FAILED}
        with pytest.raises(ModelUnavailable, match="version policy `latest 1`"):
            await use(repository, "1")
        await repository.load("affine", "1")
        assert await use(repository, "1") == ("1", 1.0)
        await repository.rescan()
        assert states(repository)[1] is READY, "a rescan does not undo LoadModel"
        repository.unload("affine", "2")
        await repository.rescan()
        assert await use(repository) == ("1", 1.0)
        repository.unload("affine")
        publish_affine(tmp_path, version=4, scale=4.0)
        await repository.rescan()
        assert set(states(repository).values()) == {UNLOADED, FAILED}, "what comes later stays unloaded too"
        await repository.load("affine")
        assert await use(repository) == ("4", 4.0)
        assert states(repository) == {1: UNLOADED, 2: UNLOADED, 3: FAILED, 4: READY}

    with_repository(tmp_path, test)


@pytest.mark.parametrize(
    "text", ["versions = 3", "versions = { latest = 0 }", "version = 'all'", "=", "versions.latest = true"]
)
def test_wrong_model_toml_is_named_and_the_policy_before_holds(tmp_path, text):
    for version in (1, 2):
        publish_affine(tmp_path, version=version)
    config = tmp_path / "test/affine/model.toml"
    config.write_text("versions.latest = 1")

    async def test(repository):
        config.write_text(text + "  # wrong")
        await repository.rescan()
        assert states(repository) == {1: UNLOADED, 2: READY}
        assert str(config) in repository.find("affine").reason
        config.unlink()
        await repository.rescan()
        assert states(repository) == {1: AVAILABLE, 2: READY}
        assert repository.find("affine").reason == ""

    with_repository(tmp_path, test)


def test_replacement_is_warm_before_what_it_replaces_goes(tmp_path):
    publish_affine(tmp_path, version=1, scale=1.0)

    async def test(repository):
        publish_affine(tmp_path, version=2, scale=2.0)
        shutil.rmtree(tmp_path / "test/affine/1")  # gone before the server looked
        rescan = asyncio.create_task(repository.rescan())
        answers = set()
        while not rescan.done():
            answers.add(await use(repository))
        answers.add(await use(repository))
        assert answers == {("1", 1.0), ("2", 2.0)}
        assert states(repository) == {2: READY}

    with_repository(tmp_path, test)


def test_retired_session_is_freed_after_the_last_lease_and_not_before(tmp_path):
    publish_affine(tmp_path)
    sessions = weakref.WeakSet()

    def open_session(path):
        session = OnnxSession(path)
        sessions.add(session)
        return session

    async def test(repository):
        async with repository.acquire("affine") as one, repository.acquire("affine") as two:
            assert one is two
            repository.unload("affine")
            assert len(sessions) == 1
            with one.batcher.admit():
                result = await one.batcher.submit({"x": np.ones((1, 4), np.float32)})
            assert result.outputs["y"][0, 0] == 2.0
            del result
            assert repository.memory.total > 0
        gc.collect()
        assert len(sessions) == 0
        assert repository.memory.total == 0

    with_repository(tmp_path, test, open_session=open_session)


def test_deleted_repository_serves_on_from_memory_and_says_so(tmp_path):
    gone, bundled = tmp_path / "gone", tmp_path / "bundled"
    publish_affine(gone, version=2, scale=2.0)
    publish_affine(bundled, version=1, scale=1.0)

    async def test(repository):
        shutil.rmtree(gone)
        for _ in range(2):
            await repository.rescan()
            assert await use(repository) == ("2", 2.0)
            assert f"{gone / 'test'} cannot be read" in repository.find("affine").reason
        publish_affine(gone, version=3, scale=3.0)
        await repository.rescan()
        assert states(repository) == {1: AVAILABLE, 3: READY}, "the folder can be read again, so what is gone is gone"
        assert repository.find("affine").reason == ""

    with_repository(gone, test, bundled)


def test_least_recently_used_goes_when_memory_is_full_and_none_in_use(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        publish_affine(tmp_path, name=name, scale=ord(name))
    monkeypatch.setattr(SessionMemory, "count", counted_as(100))
    monkeypatch.setattr(SessionMemory, "expected", lambda self, sha256, size: 100)

    async def test(repository):
        assert [repository.find(name).state for name in "abc"] == [READY, READY, AVAILABLE], "two fit at the start"
        assert (await use(repository, name="a"))[1] == ord("a")
        assert (await use(repository, name="c"))[1] == ord("c")
        assert [repository.find(name).state for name in "abc"] == [READY, AVAILABLE, READY], "b was used least recently"
        async with repository.acquire("a"), repository.acquire("c"):
            with pytest.raises(ModelMemoryFull):
                await use(repository, name="b")
        assert (await use(repository, name="b"))[1] == ord("b")
        await repository.rescan()
        assert repository.memory.total == 200
        assert repository._telemetry.evicted._value.get() == 2

    with_repository(tmp_path, test, memory_limit=250)


def counted_as(size):
    def count(self, session, sha256, file_bytes, growth):
        key = id(session)
        self._held[key] = size
        weakref.finalize(session, self._held.pop, key, None)
        return size

    return count


def test_old_versions_go_before_the_newest_of_any_model(tmp_path, monkeypatch):
    publish_affine(tmp_path, name="b")
    for version in (1, 2):
        publish_affine(tmp_path, name="a", version=version)
    publish_affine(tmp_path, name="z")
    monkeypatch.setattr(SessionMemory, "count", counted_as(100))
    monkeypatch.setattr(SessionMemory, "expected", lambda self, sha256, size: 100)

    async def test(repository):
        await use(repository, name="b")
        await use(repository, "1", name="a")
        publish_affine(tmp_path, name="z", version=2)
        await repository.rescan()
        assert states(repository, "a") == {1: AVAILABLE, 2: READY}
        assert states(repository, "b") == {1: READY}

    with_repository(tmp_path, test, memory_limit=400)


def test_a_model_larger_than_the_bound_says_so(tmp_path):
    publish_affine(tmp_path)

    async def test(repository):
        assert states(repository) == {1: AVAILABLE}
        with pytest.raises(ModelUnavailable, match="USAGI_MODEL_MEMORY_MB"):
            await use(repository)

    with_repository(tmp_path, test, memory_limit=10)


def test_memory_of_a_session_is_at_least_its_file_and_remembered():
    memory = SessionMemory(1000)

    class Session:
        pass

    one = Session()
    assert memory.count(one, "x", 200, 700) == 700
    assert memory.expected("x", 200) == 700
    assert memory.excess(200) == -100
    del one
    assert memory.total == 0
    assert memory.count(Session(), "x", 200, 0) == 700, "memory used again does not show as growth"


def test_two_hundred_cycles_under_eight_callers_fail_nobody(tmp_path):
    """Every answer's version was in service at some moment between its call and its answer."""
    for version in (1, 2, 3):
        publish_affine(tmp_path, version=version, scale=version)
    config = ServingConfig(model_roots=(tmp_path,), rescan_seconds=0.02, threads=1)
    answers, errors, stop = [], [], threading.Event()
    periods = {1: [[0.0, float("inf")]], 2: [[0.0, float("inf")]], 3: [[0.0, float("inf")]]}
    request = pb.ModelInferRequest(model_name="affine")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(np.ones(4, np.float32).tobytes())

    with running_server("test", config) as running, grpc.insecure_channel(running.address) as channel:
        infer = pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        repository = running.engine.repository

        def call():
            while not stop.is_set():
                began = time.monotonic()
                try:
                    response = infer(request, timeout=20)
                except grpc.RpcError as error:
                    errors.append(error)
                    continue
                value = float(np.frombuffer(response.raw_output_contents[0], np.float32)[0])
                answers.append((began, time.monotonic(), int(response.model_version), value))

        async def unload(version):
            repository.unload("affine", str(version))

        callers = [threading.Thread(target=call) for _ in range(8)]
        for thread in callers:
            thread.start()
        for cycle in range(200):
            version = 2 + cycle % 2
            running.submit(unload(version)).result(20)
            periods[version][-1][1] = time.monotonic()
            periods[version].append([time.monotonic(), float("inf")])
            running.submit(repository.load("affine", str(version))).result(20)
        stop.set()
        for thread in callers:
            thread.join()
    assert errors == []
    assert len(answers) > 200
    assert {version for _, _, version, _ in answers} >= {2, 3}
    for began, ended, version, value in answers:
        assert value == version
        assert any(start <= ended and began <= end for start, end in periods[version])


def test_full_disk_keeps_what_was_there(tmp_path):
    """A process that may write 2 KB a file publishes 40 KB: the kernel refuses the write, as a full disk does."""
    publish_affine(tmp_path, scale=2.0)
    script = """
import resource, signal, sys
from pathlib import Path
from shared.artifacts import publish, read_manifest
root = Path(sys.argv[1])
manifest = read_manifest(root / "test/affine/1")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
graph = (root / "test/affine/1/model.onnx").read_bytes()
def fill(folder):
    (folder / "model.onnx").write_bytes(graph)
try:
    publish(root, manifest, fill)
except OSError as error:
    sys.exit(error.errno)
"""
    size = (tmp_path / "test/affine/1/model.onnx").stat().st_size
    for limit in (size - 1, size + 1):  # the graph does not fit; the graph fits but its manifest does not
        ended = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), str(limit)], capture_output=True, text=True
        )
        assert ended.returncode == errno.EFBIG, ended.stderr

        async def test(repository):
            assert await use(repository) == ("1", 2.0)

        with_repository(tmp_path, test)
        assert [path.name for path in (tmp_path / "test/affine").iterdir()] == ["1"]


def test_publishing_again_never_leaves_the_version_without_a_manifest(tmp_path):
    publish_affine(tmp_path)
    manifest, stop, missing = tmp_path / "test/affine/1/manifest.json", threading.Event(), []

    def watch():
        while not stop.is_set():
            if not manifest.exists():
                missing.append(time.monotonic())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for scale in range(30):
        publish_affine(tmp_path, scale=scale)
    stop.set()
    watcher.join()
    assert missing == []


def test_unknown_model_is_still_unknown_after_a_load(tmp_path):
    publish_affine(tmp_path)

    async def test(repository):
        with pytest.raises(ModelNotFound):
            await repository.load("nobody")

    with_repository(tmp_path, test)
