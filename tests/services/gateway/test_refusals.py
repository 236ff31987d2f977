"""What the gateway refuses, and how each kind of caller learns why."""

import base64
import json

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from inference import open_inference_grpc_pb2 as oip
from inference import open_inference_grpc_pb2_grpc as oip_grpc
from usagi.model.v1 import model_service_pb2 as models
from usagi.model.v1 import model_service_pb2_grpc as models_grpc
from usagi.vision.v1 import vision_service_pb2 as pb
from usagi.vision.v1 import vision_service_pb2_grpc as pb_grpc

from tests.services.gateway.http_calls import (
    CLASSIFY,
    INFER,
    LIST_MODELS,
    LOAD_MODEL,
    call_json,
    call_web,
    details_of,
    error_of,
)
from tests.services.gateway.processes import other_address

LIMIT = 16 * 1024 * 1024
VISION = (("usagi-service", "vision"),)
FRAME = 8  # bytes of the image field's tag and length, with some to spare


def web_status(headers):
    encoded = headers["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(base64.b64decode(encoded + "=" * (-len(encoded) % 4)))
    assert str(status.code) == headers["grpc-status"]
    assert status.message == headers["grpc-message"]
    return status


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"image":', "expected a value"),
        ('{"image": "!!!"}', "invalid value"),
        ('{"image": ["YQ=="]}', "not repeating"),
        ('{"top_k": "many"}', "many"),
    ],
)
def test_broken_json(gateway, body, said):
    status, headers, answer = call_json(gateway.port, CLASSIFY, body)
    error = json.loads(answer)
    assert status == 400
    assert headers["content-type"] == "application/json"
    assert said in error["message"].lower()
    assert error["details"][0]["reason"] == "INVALID_JSON"
    assert error["details"][0]["domain"] == "gateway.usagi.dev"


UNKNOWN_FIELDS = [
    (CLASSIFY, {"nope": 1}, "nope"),
    (CLASSIFY, {"image": "YQ==", "topk": 3}, "topk"),
    (CLASSIFY, r'{ "image" : "a\\" , "no\"pe" : {} }', r"no\"pe"),
    (INFER, {"inputs": [{"name": "x"}, {"name": "y", "kind": "FP32"}]}, "inputs.kind"),
    (INFER, {"inputs": [{"contents": {"fp64": [1]}}]}, "inputs.contents.fp64"),
    (INFER, {"parameters": {"any": {"float_param": 1}}}, "parameters.any.float_param"),
]


@pytest.mark.parametrize(("path", "body", "field"), UNKNOWN_FIELDS)
def test_unknown_json_field(gateway, path, body, field):
    status, _, answer = call_json(gateway.port, path, body)
    error = json.loads(answer)
    assert status == 400
    assert f"has no field `{field}`" in error["message"]
    assert error["code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]


KNOWN_FIELDS = [
    (CLASSIFY, {"image": "YQ==", "topK": 3}),
    (CLASSIFY, {"image": "YQ==", "top_k": 3, "model": 'a "quoted" \\ {name}'}),
    (CLASSIFY, " {\n} "),
    (CLASSIFY, ""),
    (LIST_MODELS, '{"page_size":1,"pageToken":""}'),
]


@pytest.mark.parametrize(("path", "body"), KNOWN_FIELDS)
def test_known_json_fields_pass(gateway, path, body):
    assert call_json(gateway.port, path, body)[0] == 200


def test_maps_and_nested_messages_pass(gateway):
    body = {
        "model_name": "m",
        "parameters": {"priority": {"int64_param": 1}, "inputs": {"stringParam": "x"}},
        "inputs": [{"name": "x", "datatype": "FP32", "shape": ["1", 2], "contents": {"fp32Contents": [1.5, -2e3]}}],
    }
    status, _, answer = call_json(gateway.port, INFER, body)
    assert (status, json.loads(answer)["details"][0]["reason"]) == (400, "DOMAIN_MISSING")  # it reached the catalog


def test_unknown_query_parameter(gateway):
    status, _, answer = call_json(gateway.port, f"{CLASSIFY}?nope=1", {})
    assert status == 400
    assert "nope" in json.loads(answer)["message"]


@pytest.mark.parametrize("path", ["/", "/favicon.ico", "/usagi.vision.v1.VisionService/Nope", f"{CLASSIFY}/"])
def test_unknown_path(gateway, path):
    status, _, answer = call_json(gateway.port, path, {})
    assert status == 404
    assert json.loads(answer)["details"][0]["reason"] == "METHOD_NOT_FOUND"


@pytest.mark.parametrize("path", ["/usagi.alchemy.v1.AlchemyService/MakeGold", "/nonsense"])
def test_unknown_grpc_method(channel, path):
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(path)(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert error_of(caught).reason == "NOT_SUPPORTED"


def test_unknown_domain_lists_the_known(channel):
    with pytest.raises(grpc.RpcError) as caught:
        models_grpc.ModelServiceStub(channel).ListModels(
            models.ListModelsRequest(), metadata=(("usagi-service", "astrology"),)
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "vision" in caught.value.details()
    assert error_of(caught).reason == "DOMAIN_NOT_FOUND"


@pytest.mark.parametrize(
    "call",
    [
        lambda channel: models_grpc.ModelServiceStub(channel).LoadModel(models.LoadModelRequest(name="stub")),
        lambda channel: models_grpc.ModelServiceStub(channel).UnloadModel(models.UnloadModelRequest(name="stub")),
        lambda channel: oip_grpc.GRPCInferenceServiceStub(channel).ModelReady(oip.ModelReadyRequest(name="stub")),
        lambda channel: oip_grpc.GRPCInferenceServiceStub(channel).ModelMetadata(oip.ModelMetadataRequest(name="stub")),
        lambda channel: oip_grpc.GRPCInferenceServiceStub(channel).ModelInfer(oip.ModelInferRequest(model_name="stub")),
    ],
)
def test_methods_that_need_a_domain_say_which_there_are(channel, call):
    with pytest.raises(grpc.RpcError) as caught:
        call(channel)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "usagi-service" in caught.value.details()
    assert "vision" in caught.value.details()
    assert error_of(caught).reason == "DOMAIN_MISSING"


def test_message_at_the_limit_passes_and_one_over_it_does_not(channel):
    classify = pb_grpc.VisionServiceStub(channel).ClassifyImage
    assert classify(pb.ClassifyImageRequest(image=bytes(LIMIT - FRAME))).classifications
    for size in (LIMIT, 3 * LIMIT):
        with pytest.raises(grpc.RpcError) as caught:
            classify(pb.ClassifyImageRequest(image=bytes(size)), timeout=10)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(LIMIT) in caught.value.details()
        assert error_of(caught).reason == "MESSAGE_TOO_LARGE"


def test_json_at_the_limit_passes_and_over_it_does_not(gateway):
    def body(size):
        return {"image": base64.b64encode(bytes(size)).decode()}

    assert call_json(gateway.port, CLASSIFY, body(LIMIT - FRAME))[0] == 200
    status, _, answer = call_json(gateway.port, CLASSIFY, body(LIMIT))
    assert status == 413
    assert json.loads(answer)["details"][0]["reason"] == "MESSAGE_TOO_LARGE"


def test_anything_else_has_its_reason_too(gateway):
    status, _, answer = call_json(gateway.port, CLASSIFY, {}, filler="x" * 70_000)
    assert status == 431
    assert json.loads(answer)["details"][0]["reason"] == "REQUEST_REFUSED"


def test_expired_deadline(gateway, channel):
    with pytest.raises(grpc.RpcError) as caught:
        pb_grpc.VisionServiceStub(channel).ClassifyImage(pb.ClassifyImageRequest(model="sleep"), timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    status, _, answer = call_json(gateway.port, CLASSIFY, {"model": "sleep"}, **{"grpc-timeout": "300m"})
    assert status == 504
    assert json.loads(answer)["code"] == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


def test_admin_methods_are_closed_to_other_machines(gateway):
    address = other_address()
    if address is None:
        pytest.skip("this machine has no address but loopback; test_rendering looks at the rule itself")
    with grpc.insecure_channel(f"{address}:{gateway.port}") as outside:
        with pytest.raises(grpc.RpcError) as caught:
            models_grpc.ModelServiceStub(outside).LoadModel(models.LoadModelRequest(name="stub"), metadata=VISION)
        assert models_grpc.ModelServiceStub(outside).ListModels(models.ListModelsRequest(), metadata=VISION).models
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert error_of(caught).reason == "ADMIN_ONLY"
    for path, refused in ((LOAD_MODEL, 403), (f"{LOAD_MODEL}/", 404)):
        assert call_json(gateway.port, path, {}, host=address, **dict(VISION))[0] == refused
    _, headers, _ = call_web(gateway.port, LOAD_MODEL, models.LoadModelRequest(), host=address)
    assert headers["content-type"] == "application/grpc-web+proto"
    assert web_status(headers).code == grpc.StatusCode.PERMISSION_DENIED.value[0]


def test_admin_methods_are_closed_to_foreign_pages_in_a_local_browser(gateway):
    headers = {"usagi-service": "vision"}
    assert call_json(gateway.port, LOAD_MODEL, {"name": "stub"}, **headers)[0] == 200
    assert call_json(gateway.port, LOAD_MODEL, {}, origin="http://localhost:3000", **headers)[0] == 200
    status, _, answer = call_json(gateway.port, LOAD_MODEL, {}, origin="http://evil.example", **headers)
    assert status == 403
    assert json.loads(answer)["details"][0]["reason"] == "ADMIN_ONLY"


def test_catalog_lists_all_models_in_pages(channel):
    list_models = models_grpc.ModelServiceStub(channel).ListModels
    page = list_models(models.ListModelsRequest(page_size=2))
    assert [model.version for model in page.models] == ["1", "9"]
    rest = list_models(models.ListModelsRequest(page_size=2, page_token=page.next_page_token))
    assert [model.version for model in rest.models] == ["10"]
    assert not rest.next_page_token
    for wrong in ({"page_token": "%%%"}, {"page_size": -1}):
        with pytest.raises(grpc.RpcError) as caught:
            list_models(models.ListModelsRequest(**wrong))
        (field,) = wrong
        assert details_of(caught, error_details_pb2.BadRequest).field_violations[0].field == field


def test_catalog_finds_a_model_in_any_domain(channel):
    get_model = models_grpc.ModelServiceStub(channel).GetModel
    assert get_model(models.GetModelRequest(name="stub")).card == "# stub"
    with pytest.raises(grpc.RpcError) as caught:
        get_model(models.GetModelRequest(name="philosopher"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "stub" in caught.value.details()


def test_catalog_answers_for_the_server(channel):
    server = oip_grpc.GRPCInferenceServiceStub(channel)
    assert server.ServerLive(oip.ServerLiveRequest()).live
    assert server.ServerReady(oip.ServerReadyRequest()).ready


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_messages(channel, gateway, encoding):
    """A megabyte of gzip becomes a gigabyte in the service before anybody can count it."""
    compression = {"gzip": grpc.Compression.Gzip, "deflate": grpc.Compression.Deflate}[encoding]
    request = pb.ClassifyImageRequest(image=bytes(1_000))
    with pytest.raises(grpc.RpcError) as caught:
        pb_grpc.VisionServiceStub(channel).ClassifyImage(request, timeout=5, compression=compression)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert error_of(caught).reason == "COMPRESSION_NOT_SUPPORTED"
    status, headers, _ = call_web(gateway.port, CLASSIFY, request, **{"grpc-encoding": encoding})
    assert (status, headers["grpc-status"]) == (200, "12")
    assert "uncompressed" in web_status(headers).message
    status, headers, _ = call_web(gateway.port, CLASSIFY, request, **{"grpc-encoding": "identity"})
    assert headers.get("grpc-status", "0") == "0"
