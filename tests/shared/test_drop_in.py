"""Plain ONNX files in the model root: copied, replaced, broken, removed while others are served."""

import asyncio
import errno
import itertools
import os
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc
from usagi.model.v1 import model_service_pb2 as model_pb
from usagi.model.v1 import model_service_pb2_grpc as model_grpc

from shared.errors import ModelUnavailable
from shared.serving import plain_models
from shared.serving.batching import BatchLimits, ComputePool
from shared.serving.config import ServingConfig
from shared.serving.model_folders import FoundModel, FoundVersion, Scan
from shared.serving.repository import ModelRepository, RepositoryOptions, State
from shared.serving.settling import Settling
from shared.serving.telemetry import Telemetry
from shared.testing.graphs import publish_affine
from shared.testing.server import running_server
from tests.shared import plain_graphs as graphs

SETTLE = 0.05
READY, AVAILABLE, FAILED = State.READY, State.AVAILABLE, State.FAILED


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(plain_models, "TRIAL_SECONDS", 0.02)


def with_repository(root, test, *more_roots):
    """Runs `test(repository)` on a repository over the roots, scanned once."""

    async def main():
        pool = ComputePool(1)
        options = RepositoryOptions(settle_seconds=SETTLE)
        repository = ModelRepository("test", (root, *more_roots), pool, Telemetry("test"), options)
        await repository.rescan()
        try:
            await test(repository)
        finally:
            pool.close()

    asyncio.run(asyncio.wait_for(main(), 60))


async def settled(repository):
    await repository.rescan()
    await asyncio.sleep(SETTLE)
    await repository.rescan()


async def use(repository, name, version="", value=1.0):
    async with repository.acquire(name, version) as served:
        with served.batcher.admit():
            result = await served.batcher.submit({"x": np.full((1, 4), value, np.float32)})
        return served.version, float(result.outputs["y"][0, 0]), result.batch_size


def entries(repository, name):
    return {entry.version: entry for entry in repository.versions() if entry.name == name}


def aged(path, seconds=3600.0):
    """As if it had been copied long ago."""
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def test_three_places(tmp_path):
    base = tmp_path / "test"
    graphs.save(graphs.doubling(2), base / "flat.onnx", "flat.onnx.data")
    graphs.save(graphs.doubling(3), base / "folder/model.onnx", "weights.bin")
    for version in (1, 2):
        graphs.save(graphs.doubling(3 + version), base / f"triton/{version}/model.onnx", f"w{version}")
    publish_affine(tmp_path, scale=7.0)

    async def test(repository):
        for name in ("flat", "folder", "triton"):
            with pytest.raises(ModelUnavailable, match="may still be copied"):
                await use(repository, name)
        assert (await use(repository, "affine"))[1] == 7.0
        await asyncio.sleep(SETTLE)
        await repository.rescan()
        changed = max(path.stat().st_mtime for path in base.glob("flat.onnx*"))
        number = time.strftime("%Y%m%d%H%M%S", time.gmtime(changed))
        assert (await use(repository, "flat"))[:2] == (number, 2.0)
        assert (await use(repository, "folder"))[1] == 3.0
        assert (await use(repository, "triton"))[:2] == ("2", 5.0)
        assert (await use(repository, "triton", "1"))[:2] == ("1", 4.0)
        for name in ("flat", "folder", "triton"):
            assert entries(repository, name).popitem()[1].reason.startswith("no manifest.json: inferred from ")
        assert repository.find("affine").reason == ""

    with_repository(tmp_path, test)


def test_what_was_copied_long_ago_is_there_at_once_and_the_first_root_wins(tmp_path):
    aged(graphs.save(graphs.doubling(2), tmp_path / "one/test/it.onnx"))
    aged(graphs.save(graphs.doubling(3), tmp_path / "two/test/it.onnx"), 1800)

    async def test(repository):
        assert (await use(repository, "it"))[1] == 2.0
        assert len(entries(repository, "it")) == 1

    with_repository(tmp_path / "one", test, tmp_path / "two")


def test_a_growing_file_is_not_opened(tmp_path):
    whole = graphs.doubling(2).SerializeToString()
    path = tmp_path / "test/it.onnx"
    path.parent.mkdir()
    path.write_bytes(b"")

    async def test(repository):
        failures = repository._telemetry.load_failures
        for end in range(0, len(whole) + 1, 40):
            path.write_bytes(whole[:end])
            await repository.rescan()
            (entry,) = entries(repository, "it").values()
            assert (entry.state, "may still be copied" in entry.reason) == (FAILED, True)
            await asyncio.sleep(SETTLE)
        path.write_bytes(whole)
        await settled(repository)
        assert (await use(repository, "it"))[1] == 2.0
        assert failures._value.get() == 0

    with_repository(tmp_path, test)


@pytest.mark.parametrize("place", ["it.onnx", "it/model.onnx", "it/3/model.onnx"])
def test_replaced_broken_repaired_removed(tmp_path, place):
    path = aged(graphs.save(graphs.doubling(2), tmp_path / "test" / place))
    publish_affine(tmp_path, scale=7.0)
    numbered = "3" in place

    async def test(repository):
        first = await use(repository, "it")
        graphs.save(graphs.doubling(3), path)
        await repository.rescan()
        assert await use(repository, "it") == first, "what may still be copied replaces nothing"
        assert "from memory" in repository.find("it").reason
        await asyncio.sleep(SETTLE)
        await repository.rescan()
        second = await use(repository, "it")
        assert second[1] == 3.0
        assert (second[0] != first[0]) == (not numbered)
        assert list(entries(repository, "it")) == [int(second[0])]
        assert "from memory" not in repository.find("it").reason

        aged(path, 100).write_bytes(path.read_bytes()[:-20])
        aged(path, 100)
        await repository.rescan()
        failed = [entry for entry in entries(repository, "it").values() if entry.state is FAILED]
        assert [f"{path} is no whole ONNX file" in entry.reason for entry in failed] == [True]
        assert (await use(repository, "affine"))[1] == 7.0
        if numbered:
            with pytest.raises(ModelUnavailable, match="no whole ONNX file"):
                await use(repository, "it")
        else:
            assert await use(repository, "it") == second
            assert "serving from memory, since its file was replaced" in repository.find("it").reason

        aged(graphs.save(graphs.doubling(4), path), 80)
        await repository.rescan()
        assert (await use(repository, "it"))[1] == 4.0
        assert len(entries(repository, "it")) == 1
        path.unlink()
        await repository.rescan()
        assert not any(entry.state in (READY, AVAILABLE) for entry in entries(repository, "it").values())

    with_repository(tmp_path, test)


def test_a_file_that_is_put_back_is_what_it_was(tmp_path):
    path = aged(graphs.save(graphs.doubling(2), tmp_path / "test/it.onnx"))

    async def test(repository):
        first = await use(repository, "it")
        path.rename(tmp_path / "aside")
        path.write_bytes(b"broken")
        await settled(repository)
        assert "its file was replaced" in repository.find("it").reason
        (tmp_path / "aside").replace(path)
        await repository.rescan()
        assert len(entries(repository, "it")) == 1
        assert "memory" not in repository.find("it").reason
        assert await use(repository, "it") == first

    with_repository(tmp_path, test)


def test_files_that_are_being_written_beside_it_change_nothing(tmp_path):
    aged(graphs.save(graphs.doubling(2), tmp_path / "test/it.onnx"))
    aged(graphs.save(graphs.doubling(3), tmp_path / "test/other/1/model.onnx"))

    async def test(repository):
        before = [repository.find(name) for name in ("it", "other")]
        (tmp_path / "test/it.onnx.part").write_bytes(b"new")
        (tmp_path / "test/.it.onnx.x7").write_bytes(b"new")
        (tmp_path / "test/other/1/.model.onnx.x7").write_bytes(b"new")
        await settled(repository)
        assert [repository.find(name) for name in ("it", "other")] == before
        assert set(states(repository)) == {"it", "other"}

    with_repository(tmp_path, test)


def test_what_cannot_be_looked_at_serves_on_from_memory(tmp_path, monkeypatch):
    path = aged(graphs.save(graphs.doubling(2), tmp_path / "test/it.onnx"))
    publish_affine(tmp_path, scale=7.0)
    real = os.stat

    def no_permission(file, *arguments, **keywords):  # as in a folder without the right to search it
        if str(file) == str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return real(file, *arguments, **keywords)

    async def test(repository):
        monkeypatch.setattr(os, "stat", no_permission)
        await repository.rescan()
        assert (await use(repository, "it"))[1] == 2.0
        assert "Permission denied; serving from memory" in repository.find("it").reason
        monkeypatch.undo()
        await repository.rescan()
        assert "from memory" not in repository.find("it").reason

    with_repository(tmp_path, test)


def states(repository):
    return {entry.name: entry.state for entry in repository.versions()}


def test_new_weights_are_a_new_version(tmp_path):
    path = aged(graphs.save(graphs.doubling(2), tmp_path / "test/it.onnx", "it.onnx.data"))
    data = aged(path.with_name("it.onnx.data"))

    async def test(repository):
        first = await use(repository, "it")
        assert first[1] == 2.0
        data.write_bytes(np.float32(5).tobytes())
        await repository.rescan()
        assert await use(repository, "it") == first
        await asyncio.sleep(SETTLE)
        await repository.rescan()
        second = await use(repository, "it")
        assert second[1] == 5.0
        assert second[0] > first[0]
        data.unlink()
        await settled(repository)
        assert (await use(repository, "it"))[1] == 5.0, "from memory"
        assert any("`it.onnx.data`, which is missing" in entry.reason for entry in entries(repository, "it").values())

    with_repository(tmp_path, test)


def test_a_manifest_that_comes_later_counts(tmp_path):
    folder = publish_affine(tmp_path, scale=2.0)
    manifest, card = (folder / name for name in ("manifest.json", "card.md"))
    text = manifest.read_text()
    manifest.unlink()

    async def test(repository):
        await settled(repository)
        assert "half published" in repository.find("affine").reason, "a card without a manifest is no plain file"
        card.unlink()
        await settled(repository)
        assert repository.find("affine").plain is not None
        manifest.write_text(text)
        await repository.rescan()
        assert repository.find("affine").plain is None
        assert (await use(repository, "affine"))[1] == 2.0

    with_repository(tmp_path, test)


def test_only_what_may_share_a_run_does(tmp_path):
    aged(graphs.save(graphs.doubling(2), tmp_path / "test/rows.onnx"))
    aged(graphs.save(graphs.minus_the_mean_of_the_batch(), tmp_path / "test/whole.onnx"))

    async def test(repository):
        # so that there is a batch to share, whatever was measured
        repository.find("rows").loaded["onnx"].batcher.limits = BatchLimits(max_batch=8)
        rows = await asyncio.gather(*(use(repository, "rows", value=value) for value in range(8)))
        assert [answer[1] for answer in rows] == [2.0 * value for value in range(8)]
        assert max(answer[2] for answer in rows) == 8
        wholes = await asyncio.gather(*(use(repository, "whole", value=value) for value in range(8)))
        assert {answer[1:] for answer in wholes} == {(0.0, 1)}, "each minus its own mean"

    with_repository(tmp_path, test)


def test_replacing_under_load_fails_nobody(tmp_path):
    path = aged(graphs.save(graphs.doubling(100), tmp_path / "test/it.onnx"), 1000)

    async def test(repository):
        scale_of = {(await use(repository, "it"))[0]: 100.0}
        done = asyncio.Event()

        async def call():
            answers = []
            while not done.is_set():
                answers.append((await use(repository, "it"))[:2])
            return answers

        callers = [asyncio.create_task(call()) for _ in range(4)]
        for step in range(1, 9):
            aged(graphs.save(graphs.doubling(100 + step), path), 1000 - step)
            await repository.rescan()
            scale_of[str(max(entries(repository, "it")))] = 100.0 + step
            await asyncio.sleep(0.02)
        done.set()
        answers = set(itertools.chain.from_iterable(await asyncio.gather(*callers)))
        assert answers == set(scale_of.items())

    with_repository(tmp_path, test)


def test_settling_needs_two_looks_or_a_minute():
    clock = [100.0]
    settling = Settling(1.0, lambda: clock[0], lambda: 1_000_000.0)

    def look(size, changed):
        files = (("it.onnx", changed * 1_000_000_000, 5, size),)
        version = FoundVersion(Path("/m"), files, files, Path("/m/it.onnx"))
        return settling.judge(Scan(models={"it": FoundModel({1: version})}))

    assert look(10, 999_990) == {"it"}
    clock[0] += 0.9
    assert look(10, 999_990) == {"it"}
    clock[0] += 0.1
    assert look(10, 999_990) == set()
    assert look(11, 999_990) == {"it"}
    clock[0] += 5
    assert look(11, 999_991) == {"it"}, "another time of change"
    assert look(11, 999_000) == set(), "older than a minute"
    assert look(11, 1_000_100) == {"it"}, "a clock ahead of ours"


def test_a_server_says_what_it_made_of_it(tmp_path):
    graphs.save(graphs.doubling(2), tmp_path / "test/fresh.onnx")
    (tmp_path / "test/broken.onnx").write_bytes(b"no graph")
    with (
        running_server("test", ServingConfig(model_roots=(tmp_path,), rescan_seconds=600)) as running,
        grpc.insecure_channel(running.address) as channel,
    ):
        infer, models = pb_grpc.GRPCInferenceServiceStub(channel), model_grpc.ModelServiceStub(channel)
        index = {entry.name: entry for entry in infer.RepositoryIndex(pb.RepositoryIndexRequest()).models}
        assert (index["fresh"].state, index["broken"].state) == ("READY", "UNAVAILABLE"), "start waits for fresh files"
        assert "no manifest.json: inferred from fresh.onnx, " in index["fresh"].reason
        assert f"{tmp_path}/test/broken.onnx is no whole ONNX file" in index["broken"].reason
        model = models.GetModel(model_pb.GetModelRequest(name="fresh"))
        assert model.model.reason == index["fresh"].reason
        assert model.model.variants[0].metrics["latency_p50_ms"] > 0
        assert '"batched": true' in model.manifest_json
        graphs.save(graphs.doubling(3), tmp_path / "test/fresh.onnx")
        loaded = models.LoadModel(model_pb.LoadModelRequest(name="fresh"))
        assert loaded.model.state == model_pb.MODEL_STATE_READY, "LoadModel waits for it too"
        request = pb.ModelInferRequest(model_name="fresh")
        request.inputs.add(name="x", datatype="FP32", shape=[2, 4])
        request.raw_input_contents.append(np.ones((2, 4), np.float32).tobytes())
        for _ in range(2):  # the second from a plan
            answer = infer.ModelInfer(request)
            assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == [3.0] * 8
        statistics = infer.ModelStatistics(pb.ModelStatisticsRequest(name="fresh")).model_stats
        assert statistics[-1].inference_count == 4
