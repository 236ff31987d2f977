"""The unmodified tritonclient.grpc against a service, directly and through the real gateway."""

import subprocess
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2
from inference import model_config_pb2
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc
from onnx import TensorProto

from shared.serving.config import ServingConfig
from shared.testing.graphs import publish_affine, publish_identity
from shared.testing.server import running_server
from tests.services.gateway.http_calls import error_of
from tests.services.gateway.processes import running_gateway, wait_for_health
from tests.shared import plain_graphs as graphs
from tests.shared.pipelines import write_pipeline

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-interop" / "bin" / "python"


def run(*arguments):
    assert PYTHON.exists(), "make .venv-interop/.made (make test does it)"
    done = subprocess.run(
        [PYTHON, HERE / "triton_calls.py", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.split()


CHAIN = """
[[steps]]
name = "once"
model = "affine"

[[steps]]
name = "twice"
model = "affine"
inputs = { x = "once.y" }
when = "max(once.y) < 10"

[outputs]
y = ["twice.y", "once.y"]
"""
PARTS = [
    "server",
    "repository",
    "inference",
    "callbacks",
    "stream",
    "big_stream",
    "errors",
    "statistics",
    "pipeline",
    "plain",
    "cached",
]


@pytest.fixture
def address(tmp_path):
    publish_affine(tmp_path, service="vision")
    broken = publish_affine(tmp_path, service="vision", name="broken")
    (broken / "model.onnx").write_bytes(b"no graph")
    publish_identity(tmp_path, TensorProto.STRING, "object", service="vision", name="text")
    publish_affine(tmp_path, service="vision", name="cached")
    (tmp_path / "vision/cached/model.toml").write_text("cache = { megabytes = 1 }")
    publish_identity(tmp_path, TensorProto.FLOAT16, "float16", service="vision", name="half")
    write_pipeline(tmp_path, "chain", CHAIN, service="vision")
    graphs.save(graphs.doubling(), tmp_path / "vision/plain.onnx", "plain.onnx.data")
    graphs.save(graphs.minus_the_mean_of_the_batch(), tmp_path / "vision/centred/1/model.onnx")
    (tmp_path / "vision/cut.onnx").write_bytes(graphs.doubling().SerializeToString()[:-9])
    with running_server("vision", ServingConfig(model_roots=(tmp_path,), rescan_seconds=600)) as running:
        yield running.address


def test_directly(address):
    assert run(address) == PARTS


def test_through_the_gateway(address):
    with running_gateway(USAGI_UPSTREAM_VISION=address) as gateway:
        wait_for_health(gateway.target, health_pb2.HealthCheckResponse.SERVING)
        assert run(gateway.target, "vision") == PARTS
        with grpc.insecure_channel(gateway.target) as channel:
            stub = pb_grpc.GRPCInferenceServiceStub(channel)
            index = stub.RepositoryIndex(pb.RepositoryIndexRequest())
            served = {"affine", "cached", "centred", "chain", "half", "plain", "text"}
            assert {*served, "broken", "cut"} == {entry.name for entry in index.models}
            ready = stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True))
            assert served == {entry.name for entry in ready.models}
            for call in (stub.ModelInfer, stub.ModelConfig, stub.RepositoryModelLoad, stub.LogSettings):
                with pytest.raises(grpc.RpcError) as caught:
                    call(request_of(call, stub))
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert "vision" in caught.value.details()
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.ModelStreamInfer(iter([pb.ModelInferRequest()])))
            assert error_of(caught).reason == "DOMAIN_MISSING"


def request_of(call, stub):
    requests = {
        stub.ModelInfer: pb.ModelInferRequest,
        stub.ModelConfig: pb.ModelConfigRequest,
        stub.RepositoryModelLoad: pb.RepositoryModelLoadRequest,
        stub.LogSettings: pb.LogSettingsRequest,
    }
    return requests[call]()


def messages(files):
    found = {}
    for file in files:
        for message in file.message_type:
            copy = descriptor_pb2.DescriptorProto.FromString(message.SerializeToString())
            found[message.name] = without_json_names(copy)
        found.update({enum.name: enum for enum in file.enum_type})
    return found


def without_json_names(message):
    for field in message.field:
        field.ClearField("json_name")
    for nested in message.nested_type:
        without_json_names(nested)
    return message


def test_every_field_is_tritons():
    theirs = [descriptor_pb2.FileDescriptorProto.FromString(bytes.fromhex(line)) for line in run("--descriptors")]
    ours = [
        descriptor_pb2.FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)
        for module in (model_config_pb2, pb)
    ]
    expected, found = messages(theirs), messages(ours)
    assert set(found) == set(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    methods = [{(m.name, m.input_type, m.output_type) for m in files[1].service[0].method} for files in (theirs, ours)]
    assert methods[0] == methods[1]
