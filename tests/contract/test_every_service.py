"""What every service promises, asked of real processes directly and through the gateway, with the shipped models."""

import contextlib
import json
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc
from usagi.model.v1 import model_service_pb2 as model_pb
from usagi.model.v1 import model_service_pb2_grpc as model_grpc

from shared.artifacts import read_manifest
from shared.client.local import local_stack
from shared.services_table import load_table
from shared.serving.front import FRONTS
from shared.serving.session import OnnxSession

SERVICES = load_table().services
MODELS = Path("deploy/models")
COMMON = ["usagi.model.v1.ModelService", "inference.GRPCInferenceService", "grpc.health.v1.Health"]


@pytest.fixture(scope="module", params=FRONTS)
def stack(tmp_path_factory, request):
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as started:
        patch.setenv("USAGI_FRONT", request.param)
        yield started.enter_context(local_stack(tmp_path_factory.mktemp("logs"), free_ports=True))


@pytest.fixture(params=["direct", "gateway"])
def way(request):
    return request.param


@pytest.fixture(params=sorted(SERVICES))
def service(request):
    return SERVICES[request.param]


@pytest.fixture
def channel(stack, service, way):
    target = stack.addresses[service.name] if way == "direct" else stack.target
    with grpc.insecure_channel(target) as opened:
        yield grpc.intercept_channel(opened, ServiceHeader(service.name))


class ServiceHeader(grpc.UnaryUnaryClientInterceptor, grpc.StreamStreamClientInterceptor):
    """Adds `usagi-service` to every call."""

    def __init__(self, name):
        self._name = name

    def _with_header(self, details):
        metadata = [*(details.metadata or ()), ("usagi-service", self._name)]
        return details._replace(metadata=metadata, timeout=20)

    def intercept_unary_unary(self, continuation, details, request):
        return continuation(self._with_header(details), request)

    def intercept_stream_stream(self, continuation, details, requests):
        return continuation(self._with_header(details), requests)


def test_health_of_every_name(channel, service):
    stub = health_pb2_grpc.HealthStub(channel)
    for name in ["", *service.grpc_services, *COMMON[:2]]:
        answer = stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, name
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="nope"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_health_lists_every_name(channel, service):
    statuses = health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest()).statuses
    assert {"", *service.grpc_services, *COMMON[:2]} <= set(statuses)
    assert {entry.status for entry in statuses.values()} == {health_pb2.HealthCheckResponse.SERVING}


NO_MESSAGE = b"\xff\xff\xff"
"""An unfinished tag."""
UNARY = ("grpc.health.v1.Health/Check", "usagi.model.v1.ModelService/GetModel", f"{COMMON[1]}/ModelInfer")
STREAMS = ("grpc.health.v1.Health/Watch", "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")


@pytest.mark.parametrize("method", [*UNARY, *STREAMS])
def test_bytes_that_are_no_message(channel, method):
    """Also of the methods that gRPC's own servicers answer; gRPC itself calls this INTERNAL or UNKNOWN."""

    def call():
        if method in UNARY:
            return channel.unary_unary(f"/{method}")(NO_MESSAGE)
        return list(channel.stream_stream(f"/{method}")(iter([NO_MESSAGE])))

    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(caught.value) == "INVALID_INPUT"


@pytest.mark.parametrize("name", ["x" * 100_000, "é" * 50_000])
def test_what_a_caller_sent_never_makes_a_status_larger_than_headers_may_be(channel, service, name):
    with pytest.raises(grpc.RpcError) as caught:
        model_grpc.ModelServiceStub(channel).GetModel(model_pb.GetModelRequest(name=name))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert reason_of(caught.value) == "MODEL_NOT_FOUND"
    assert "bytes left out" in caught.value.details()
    models = sorted(path.name for path in (MODELS / service.name).iterdir())
    assert caught.value.details().endswith(models[-1])


def reason_of(error):
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(error).details[0].Unpack(info)
    return info.reason


def test_reflection_without_knowing_a_proto(channel, service):
    database = ProtoReflectionDescriptorDatabase(channel)
    listed = set(database.get_services())
    assert {*service.grpc_services, *COMMON} <= listed
    pool = descriptor_pool.DescriptorPool(database)
    for name in service.grpc_services:
        assert pool.FindServiceByName(name).methods


def test_models_are_ready_with_card_and_metrics(channel, service):
    stub = model_grpc.ModelServiceStub(channel)
    models = stub.ListModels(model_pb.ListModelsRequest()).models
    assert models
    for model in models:
        assert model.state == model_pb.MODEL_STATE_READY, model.reason
        assert model.service == service.name
        answer = stub.GetModel(model_pb.GetModelRequest(name=model.name, version=model.version))
        assert answer.card.startswith(f"# {model.name}")
        if is_pipeline(channel, model):
            continue  # its models have the rest
        assert model.variants[0].loaded
        assert json.loads(answer.manifest_json)["training"]["command"]


def is_pipeline(channel, model):
    stub = pb_grpc.GRPCInferenceServiceStub(channel)
    return stub.ModelMetadata(pb.ModelMetadataRequest(name=model.name)).platform == "ensemble"


def something(spec):
    """Two rows of an input; other free dimensions are 1."""
    shape = [2, *(max(1, size) for size in spec.shape[1:])]
    if spec.datatype == "INT64":
        return np.ones(shape, np.int64)
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def test_every_variant_gives_what_onnx_runtime_gives(channel, service):
    stub = pb_grpc.GRPCInferenceServiceStub(channel)
    models = model_grpc.ModelServiceStub(channel).ListModels(model_pb.ListModelsRequest()).models
    for model in models:
        for variant in model.variants:
            folder = MODELS / service.name / model.name / model.version
            if not folder.is_dir():
                continue  # not bundled: somebody published it on this machine
            session = OnnxSession(folder / read_manifest(folder).variants[variant.name].file)
            request = pb.ModelInferRequest(model_name=model.name, model_version=model.version)
            request.parameters["variant"].string_param = variant.name
            feeds = {spec.name: something(spec) for spec in model.inputs}
            for spec in model.inputs:
                request.inputs.add(name=spec.name, datatype=spec.datatype, shape=feeds[spec.name].shape)
                request.raw_input_contents.append(feeds[spec.name].tobytes())
            response = stub.ModelInfer(request)
            assert response.parameters["variant"].string_param == variant.name
            expected = session.run(feeds)[model.outputs[0].name]
            served = np.frombuffer(response.raw_output_contents[0], np.float32).reshape(expected.shape)
            np.testing.assert_allclose(served, expected, rtol=1e-5, atol=1e-5)


def test_protos_follow_the_conventions():
    """Beyond what buf lints: typed responses carry InferenceInfo, pictures and tensors are bytes."""
    with open("shared/gen/usagi.binpb", "rb") as file:  # noqa: PTH123
        files = descriptor_pb2.FileDescriptorSet.FromString(file.read()).file
    messages = {f".{file.package}.{message.name}": message for file in files for message in file.message_type}
    for service in SERVICES.values():
        for name in service.grpc_services:
            package, _, short = name.rpartition(".")
            file = next(file for file in files if file.package == package)
            proto = next(entry for entry in file.service if entry.name == short)
            for method in proto.method:
                if not method.client_streaming:
                    fields = {field.type_name for field in messages[method.output_type].field}
                    assert ".usagi.model.v1.InferenceInfo" in fields, method.name
