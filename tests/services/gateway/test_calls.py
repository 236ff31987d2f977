"""Calls through a real Envoy: gRPC, gRPC-Web and JSON, and where each goes."""

import base64
import json
import struct

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from inference import open_inference_grpc_pb2 as oip
from inference import open_inference_grpc_pb2_grpc as oip_grpc
from usagi.model.v1 import model_service_pb2 as models
from usagi.model.v1 import model_service_pb2_grpc as models_grpc
from usagi.vision.v1 import vision_service_pb2 as pb
from usagi.vision.v1 import vision_service_pb2_grpc as pb_grpc

from shared.services_table import load_table
from tests.services.gateway.http_calls import CLASSIFY, LIST_MODELS, call_json, call_web, error_of, web_frames

VISION = (("usagi-service", "vision"),)
SERVING = health_pb2.HealthCheckResponse.SERVING


def labels(response):
    return dict(entry.label.split("=", 1) for entry in response.classifications)


def test_grpc_call_carries_the_ids_there_and_back(channel):
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    metadata = (("traceparent", traceparent), ("x-request-id", "mine"))
    response, call = pb_grpc.VisionServiceStub(channel).ClassifyImage.with_call(
        pb.ClassifyImageRequest(image=b"abc"), metadata=metadata
    )
    expected = {"bytes": "3", "x-request-id": "mine", "traceparent": traceparent, "authorization": ""}
    assert labels(response) == expected
    assert dict(call.initial_metadata())["x-request-id"] == "mine"


def test_the_gateway_makes_a_request_id(channel):
    response, call = pb_grpc.VisionServiceStub(channel).ClassifyImage.with_call(pb.ClassifyImageRequest())
    made = labels(response)["x-request-id"]
    assert len(made) == 36
    assert dict(call.initial_metadata())["x-request-id"] == made


def test_stream_may_grow_past_the_limit_of_one_message(channel):
    picture = pb.ClassifyImageRequest(image=bytes(9 * 1024 * 1024))
    requests = (pb.ClassifyImagesRequest(id=str(index), request=picture) for index in range(3))
    answers = pb_grpc.VisionServiceStub(channel).ClassifyImages(requests)
    assert [answer.id for answer in answers] == ["0", "1", "2"]


def test_grpc_web_call(gateway):
    status, _, body = call_web(gateway.port, CLASSIFY, pb.ClassifyImageRequest(image=b"abc"))
    message, trailers = web_frames(body)
    assert status == 200
    assert labels(pb.ClassifyImageResponse.FromString(message))["bytes"] == "3"
    assert b"grpc-status:0" in trailers


def test_grpc_web_preflight_of_a_local_page_only(gateway):
    wanted = {"access-control-request-method": "POST"}
    _, allowed, _ = call_json(gateway.port, CLASSIFY, None, method="OPTIONS", origin="http://localhost:3000", **wanted)
    _, refused, _ = call_json(gateway.port, CLASSIFY, None, method="OPTIONS", origin="http://evil.example", **wanted)
    assert allowed["access-control-allow-origin"] == "http://localhost:3000"
    assert "grpc-status-details-bin" in allowed["access-control-expose-headers"]
    assert "access-control-allow-origin" not in refused


def test_json_call(gateway):
    image = base64.b64encode(b"abc").decode()
    status, headers, body = call_json(gateway.port, CLASSIFY, {"image": image, "model": "m"})
    assert status == 200
    assert headers["x-request-id"]
    answer = json.loads(body)
    assert answer["classifications"][0]["label"] == "bytes=3"
    assert answer["info"]["model"] == "m"


def test_json_shows_the_details_of_a_service_error(gateway):
    status, _, body = call_json(gateway.port, CLASSIFY, {"model": "refuse"})
    assert status == 400
    error = json.loads(body)
    assert error["code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert error["details"][0]["reason"] == "INVALID_INPUT"
    assert error["details"][1]["field_violations"][0]["field"] == "image"


def test_common_services_go_by_header(channel):
    metadata = oip_grpc.GRPCInferenceServiceStub(channel).ServerMetadata
    assert metadata(oip.ServerMetadataRequest(), metadata=VISION).name == "usagi-vision"
    assert metadata(oip.ServerMetadataRequest()).name == "usagi"
    load = models_grpc.ModelServiceStub(channel).LoadModel
    assert load(models.LoadModelRequest(name="stub"), metadata=VISION).replica == "stub"
    check = health_pb2_grpc.HealthStub(channel).Check
    assert check(health_pb2.HealthCheckRequest(), metadata=VISION).status == SERVING
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    reflect = channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    (answer,) = reflect(iter([ask]), metadata=VISION)
    assert [service.name for service in answer.list_services_response.service] == ["usagi.vision.v1.VisionService"]


@pytest.mark.parametrize("authority", ["vision", "vision.usagi.test", "vision.usagi.test:8080"])
def test_common_services_go_by_authority(gateway, authority):
    with grpc.insecure_channel(gateway.target, options=[("grpc.default_authority", authority)]) as opened:
        metadata = oip_grpc.GRPCInferenceServiceStub(opened).ServerMetadata
        assert metadata(oip.ServerMetadataRequest()).name == "usagi-vision"


def test_header_wins_over_authority(gateway):
    with grpc.insecure_channel(gateway.target, options=[("grpc.default_authority", "vision")]) as opened:
        call = oip_grpc.GRPCInferenceServiceStub(opened).ServerMetadata
        with pytest.raises(grpc.RpcError) as caught:
            call(oip.ServerMetadataRequest(), metadata=(("usagi-service", "astrology"),))
    assert error_of(caught).reason == "DOMAIN_NOT_FOUND"


def test_json_goes_by_header_too(gateway):
    _, _, own = call_json(gateway.port, LIST_MODELS, {}, **{"usagi-service": "vision"})
    _, _, merged = call_json(gateway.port, LIST_MODELS, {})
    assert [model["version"] for model in json.loads(own)["models"]] == ["10", "9", "1"]
    assert [model["version"] for model in json.loads(merged)["models"]] == ["1", "9", "10"]


@pytest.mark.parametrize("version", ["v1alpha", "v1"])
def test_reflection_lists_every_domain(channel, version):
    reflect = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    (answer,) = reflect(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    listed = {service.name for service in answer.list_services_response.service}
    typed = {name for service in load_table(only="vision").services.values() for name in service.grpc_services}
    common = {"usagi.model.v1.ModelService", "inference.GRPCInferenceService", "grpc.health.v1.Health"}
    assert typed | common <= listed


def test_a_client_without_protos_can_call_by_reflection(channel):
    pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    method = pool.FindServiceByName("usagi.vision.v1.VisionService").FindMethodByName("ClassifyImage")
    request_type = message_factory.GetMessageClass(method.input_type)
    response_type = message_factory.GetMessageClass(method.output_type)
    call = channel.unary_unary(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=request_type.SerializeToString,
        response_deserializer=response_type.FromString,
    )
    assert labels(call(request_type(image=b"four")))["bytes"] == "4"


def test_grpc_web_text_of_the_frame():
    """The helper that the tests above trust."""
    assert web_frames(struct.pack(">BI", 0, 2) + b"ab" + struct.pack(">BI", 0x80, 3) + b"x:1") == (b"ab", b"x:1")
