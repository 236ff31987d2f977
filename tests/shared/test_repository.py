"""The model repository of a running server: publish, replace, break, remove, load, unload; all else serves on."""

import asyncio
import shutil
import threading
import time

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc
from usagi.model.v1 import model_service_pb2 as model_pb
from usagi.model.v1 import model_service_pb2_grpc as model_grpc

from shared.serving.config import ServingConfig
from shared.serving.engine import Engine
from shared.serving.server import ModelServer
from shared.serving.session import OnnxSession
from shared.testing.graphs import publish_affine
from shared.testing.server import no_services, running_server


class Caller:
    """A client of one server, with what the tests ask again and again."""

    def __init__(self, running):
        self.channel = grpc.insecure_channel(running.address)
        self.infer_stub = pb_grpc.GRPCInferenceServiceStub(self.channel)
        self.models = model_grpc.ModelServiceStub(self.channel)
        self.running = running

    def infer(self, value=1.0, name="affine", version="", rows=1, timeout=20):
        request = pb.ModelInferRequest(model_name=name, model_version=version, id="7")
        request.inputs.add(name="x", datatype="FP32", shape=[rows, 4])
        request.raw_input_contents.append(np.full((rows, 4), value, np.float32).tobytes())
        response = self.infer_stub.ModelInfer(request, timeout=timeout)
        output = np.frombuffer(response.raw_output_contents[0], np.float32)
        return response.model_version, float(output[0])

    def listing(self):
        return {(m.name, m.version): m for m in self.models.ListModels(model_pb.ListModelsRequest()).models}

    def rescan(self):
        self.running.submit(self.running.engine.repository.rescan()).result(20)


def failure(call, *arguments, **keywords):
    """The code and the ErrorInfo of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **keywords)
    status = rpc_status.from_call(caught.value)
    info = error_details_pb2.ErrorInfo()
    assert status is not None
    assert status.details[0].Unpack(info)
    return caught.value.code().name, info, status.message


@pytest.fixture
def roots(tmp_path):
    return tmp_path / "writable", tmp_path / "bundled"


@pytest.fixture
def caller(roots):
    publish_affine(roots[1], scale=2.0)
    config = ServingConfig(model_roots=roots, rescan_seconds=600, threads=1)
    with running_server("test", config) as running:
        made = Caller(running)
        yield made
        made.channel.close()


def test_serves_and_echoes(caller):
    assert caller.infer(3.0) == ("1", 6.0)


def test_new_version_becomes_the_newest_and_old_ones_stay(caller, roots):
    publish_affine(roots[0], version=2, scale=5.0)
    assert caller.infer(1.0) == ("1", 2.0)
    caller.rescan()
    assert caller.infer(1.0) == ("2", 5.0)
    assert caller.infer(1.0, version="1") == ("1", 2.0)


def test_writable_root_wins_over_the_bundled_one(caller, roots):
    publish_affine(roots[0], version=1, scale=7.0)
    caller.rescan()
    assert caller.infer(1.0) == ("1", 7.0)


def test_watcher_finds_versions_by_itself(tmp_path):
    publish_affine(tmp_path)
    with running_server("test", ServingConfig(model_roots=(tmp_path,), rescan_seconds=0.05, threads=1)) as running:
        caller = Caller(running)
        publish_affine(tmp_path, version=9, scale=9.0)
        deadline = time.monotonic() + 10
        while caller.infer(1.0) != ("9", 9.0):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        caller.channel.close()


def corrupt_bytes(folder):
    (folder / "model.onnx").write_bytes(b"not a graph")


def truncate(folder):
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-20])


def flip_a_bit(folder):
    path = folder / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def break_manifest(folder):
    (folder / "manifest.json").write_text("{", encoding="utf-8")


def remove_graph(folder):
    (folder / "model.onnx").unlink()


@pytest.mark.parametrize("damage", [corrupt_bytes, truncate, flip_a_bit, break_manifest, remove_graph])
def test_broken_version_says_why_and_the_rest_serves(caller, roots, damage):
    folder = publish_affine(roots[0], version=2)
    publish_affine(roots[0], name="other", scale=3.0)
    damage(folder)
    caller.rescan()
    entry = caller.listing()["affine", "2"]
    assert entry.state == model_pb.MODEL_STATE_FAILED
    assert str(folder) in entry.reason
    code, info, message = failure(caller.infer, version="2")
    assert (code, info.reason, info.domain) == ("FAILED_PRECONDITION", "MODEL_UNAVAILABLE", "test.usagi.dev")
    assert entry.reason in message
    assert caller.infer(1.0) == ("1", 2.0), "the newest that is not broken answers"
    assert caller.infer(1.0, name="other") == ("1", 3.0)


def test_half_published_version_says_so_until_it_is_whole(caller, roots):
    folder = publish_affine(roots[0], version=2, scale=5.0)
    graph, manifest = (folder / "model.onnx").read_bytes(), (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").unlink()
    caller.rescan()
    entry = caller.listing()["affine", "2"]
    assert entry.state == model_pb.MODEL_STATE_FAILED
    assert "has no manifest.json" in entry.reason
    assert caller.infer(1.0) == ("1", 2.0)
    (folder / "model.onnx").unlink()
    (folder / "manifest.json").write_bytes(manifest)
    caller.rescan()
    assert "model.onnx cannot be read" in caller.listing()["affine", "2"].reason
    (folder / "model.onnx").write_bytes(graph)
    caller.rescan()
    assert caller.infer(1.0) == ("2", 5.0)


def test_repaired_version_serves_again(caller, roots):
    folder = publish_affine(roots[0], version=2, scale=5.0)
    flip_a_bit(folder)
    caller.rescan()
    assert caller.listing()["affine", "2"].state == model_pb.MODEL_STATE_FAILED
    publish_affine(roots[0], version=2, scale=6.0)
    caller.rescan()
    assert caller.infer(1.0) == ("2", 6.0)


def test_removed_version_is_gone_and_republished_one_is_new(caller, roots):
    publish_affine(roots[0], version=2, scale=5.0)
    caller.rescan()
    shutil.rmtree(roots[0] / "test" / "affine" / "2")
    caller.rescan()
    assert caller.infer(1.0) == ("1", 2.0)
    code, info, _ = failure(caller.infer, version="2")
    assert (code, info.reason) == ("NOT_FOUND", "VERSION_NOT_FOUND")
    assert info.metadata["known"] == "1"


def test_unknown_model_and_version_list_what_there_is(caller):
    code, info, message = failure(caller.infer, name="nope")
    assert (code, info.reason) == ("NOT_FOUND", "MODEL_NOT_FOUND")
    assert "known: affine" in message
    assert failure(caller.infer, version="x")[0] == "NOT_FOUND"


def test_unload_and_load(caller):
    caller.models.UnloadModel(model_pb.UnloadModelRequest(name="affine"))
    assert caller.listing()["affine", "1"].state == model_pb.MODEL_STATE_UNLOADED
    code, info, _ = failure(caller.infer)
    assert (code, info.reason) == ("FAILED_PRECONDITION", "MODEL_UNAVAILABLE")
    caller.rescan()
    assert failure(caller.infer)[0] == "FAILED_PRECONDITION", "a rescan does not undo an explicit unload"
    answer = caller.models.LoadModel(model_pb.LoadModelRequest(name="affine"))
    assert answer.model.state == model_pb.MODEL_STATE_READY
    assert answer.replica
    assert caller.infer(1.0) == ("1", 2.0)


def test_republishing_under_load_fails_nobody(caller, roots):
    stop = threading.Event()
    seen, errors = set(), []

    def call():
        while not stop.is_set():
            try:
                seen.add(caller.infer(1.0))
            except grpc.RpcError as error:
                errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for version in range(2, 12):
        publish_affine(roots[0], version=version, scale=float(version))
        caller.rescan()
        if version > 4:
            shutil.rmtree(roots[0] / "test" / "affine" / str(version - 2))
            caller.rescan()
    time.sleep(0.1)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert ("11", 11.0) in seen
    assert all(float(version) == value or version == "1" for version, value in seen)


def test_calls_before_the_models_are_warm_are_told_to_come_back(tmp_path):
    publish_affine(tmp_path)
    release = threading.Event()

    def open_slowly(path):
        assert release.wait(20)
        return OnnxSession(path)

    async def ask_early(port):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            stub = pb_grpc.GRPCInferenceServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ModelMetadata(pb.ModelMetadataRequest(name="affine"))
            return health.status, caught.value

    async def main():
        config = ServingConfig(model_roots=(tmp_path,), port=0, metrics_port=0, threads=1)
        server = ModelServer(Engine("test", config, open_slowly), no_services)
        starting = asyncio.create_task(server.start())
        while not server.port:
            await asyncio.sleep(0.01)
        early = await ask_early(server.port)
        release.set()
        await starting
        assert server.engine.repository.find("affine").version == 1
        await server.stop()
        return early

    status, error = asyncio.run(asyncio.wait_for(main(), 30))
    assert status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "still loading" in error.details()


def test_pages(caller, roots):
    for index in range(5):
        publish_affine(roots[0], name=f"m{index}")
    caller.rescan()
    names, token = [], ""
    while True:
        page = caller.models.ListModels(model_pb.ListModelsRequest(page_size=2, page_token=token))
        assert len(page.models) <= 2
        names += [model.name for model in page.models]
        token = page.next_page_token
        if not token:
            break
    assert names == ["affine", "m0", "m1", "m2", "m3", "m4"]
    assert (
        failure(caller.models.ListModels, model_pb.ListModelsRequest(page_size=-1))[1].metadata["field"] == "page_size"
    )
    code, info, _ = failure(caller.models.ListModels, model_pb.ListModelsRequest(page_token="x"))
    assert (code, info.metadata["field"]) == ("INVALID_ARGUMENT", "page_token")


def test_get_model_returns_card_and_manifest(caller):
    answer = caller.models.GetModel(model_pb.GetModelRequest(name="affine"))
    assert answer.card == "# a tiny model\n"
    assert '"name": "affine"' in answer.manifest_json
    assert answer.model.variants[0].loaded
    assert failure(caller.models.GetModel, model_pb.GetModelRequest())[1].metadata["field"] == "name"
