"""The Open Inference Protocol over a real server: contents raw and typed, metadata, and every kind of wrong tensor."""

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc

from shared.serving.config import ServingConfig
from shared.serving.front import FRONTS
from shared.serving.tensors import from_contents, from_raw, to_raw
from shared.testing.graphs import publish_affine
from shared.testing.server import running_server


@pytest.fixture(scope="module", params=FRONTS)
def channel(tmp_path_factory, request):
    root = tmp_path_factory.mktemp("models")
    publish_affine(root)
    with (
        running_server("test", ServingConfig(model_roots=(root,), threads=1, front=request.param)) as running,
        grpc.insecure_channel(running.address) as opened,
    ):
        yield opened


@pytest.fixture(scope="module")
def stub(channel):
    return pb_grpc.GRPCInferenceServiceStub(channel)


def raw_request(array, datatype="FP32", name="x"):
    request = pb.ModelInferRequest(model_name="affine", id="42")
    request.inputs.add(name=name, datatype=datatype, shape=array.shape)
    request.raw_input_contents.append(array.tobytes())
    return request


ARRAY = np.arange(8, dtype=np.float32).reshape(2, 4)


def test_live_ready_metadata(stub):
    assert stub.ServerLive(pb.ServerLiveRequest()).live
    assert stub.ServerReady(pb.ServerReadyRequest()).ready
    assert stub.ModelReady(pb.ModelReadyRequest(name="affine")).ready
    assert stub.ServerMetadata(pb.ServerMetadataRequest()).name == "usagi-test"
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="affine"))
    assert (metadata.versions, metadata.platform) == (["1"], "onnxruntime_onnx")
    assert (metadata.inputs[0].name, metadata.inputs[0].datatype, list(metadata.inputs[0].shape)) == (
        "x",
        "FP32",
        [-1, 4],
    )


def test_raw_contents(stub):
    response = stub.ModelInfer(raw_request(ARRAY))
    assert (response.model_name, response.model_version, response.id) == ("affine", "1", "42")
    output = response.outputs[0]
    assert (output.name, output.datatype, list(output.shape)) == ("y", "FP32", [2, 4])
    np.testing.assert_array_equal(np.frombuffer(response.raw_output_contents[0], np.float32).reshape(2, 4), 2 * ARRAY)


def test_typed_contents(stub):
    request = pb.ModelInferRequest(model_name="affine")
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[2, 4])
    tensor.contents.fp32_contents.extend(ARRAY.ravel().tolist())
    response = stub.ModelInfer(request)
    np.testing.assert_array_equal(np.frombuffer(response.raw_output_contents[0], np.float32).reshape(2, 4), 2 * ARRAY)


def test_requested_outputs(stub):
    request = raw_request(ARRAY)
    request.outputs.add(name="y")
    assert [output.name for output in stub.ModelInfer(request).outputs] == ["y"]


def no_model(request):
    request.model_name = ""


def unknown_input(request):
    request.inputs[0].name = "z"


def twice(request):
    request.inputs.add().CopyFrom(request.inputs[0])
    request.raw_input_contents.append(request.raw_input_contents[0])


def no_inputs(request):
    del request.inputs[:]
    del request.raw_input_contents[:]


def wrong_datatype(request):
    request.inputs[0].datatype = "INT32"


def unknown_datatype(request):
    request.inputs[0].datatype = "FLOAT"


def wrong_shape(request):
    request.inputs[0].shape[1] = 5


def wrong_rank(request):
    request.inputs[0].shape.append(1)


def negative_shape(request):
    request.inputs[0].shape[0] = -2


def no_rows(request):
    request.inputs[0].shape[0] = 0
    request.raw_input_contents[0] = b""


def short_bytes(request):
    request.raw_input_contents[0] = b"1234567"


def raw_and_typed(request):
    request.inputs[0].contents.fp32_contents.append(1)


def too_many_raw(request):
    request.raw_input_contents.append(b"")


def unknown_output(request):
    request.outputs.add(name="q")


def huge_shape(request):
    request.inputs[0].shape[0] = 2**62


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (no_model, "model_name"),
        (unknown_input, "inputs[0].name"),
        (twice, "inputs[1].name"),
        (no_inputs, "inputs"),
        (wrong_datatype, "inputs[0].datatype"),
        (unknown_datatype, "inputs[0].datatype"),
        (wrong_shape, "inputs[0].shape"),
        (wrong_rank, "inputs[0].shape"),
        (negative_shape, "raw_input_contents[0].shape"),
        (no_rows, "inputs"),
        (short_bytes, "raw_input_contents[0]"),
        (raw_and_typed, "inputs[0].contents"),
        (too_many_raw, "raw_input_contents"),
        (unknown_output, "outputs[0].name"),
        (huge_shape, "raw_input_contents[0]"),
    ],
)
def test_wrong_tensors_name_the_field(stub, spoil, field):
    request = raw_request(ARRAY)
    spoil(request)
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value.details()
    details = {packed.TypeName(): packed for packed in rpc_status.from_call(caught.value).details}
    bad = error_details_pb2.BadRequest()
    details["google.rpc.BadRequest"].Unpack(bad)
    assert bad.field_violations[0].field == field


def test_bytes_that_are_no_message(channel):
    call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"\xff\xff\xff\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert rpc_status.from_call(caught.value) is not None


def test_unknown_method_has_details(channel):
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/inference.GRPCInferenceService/Nope")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(caught.value).details[0].Unpack(info)
    assert info.reason == "NOT_SUPPORTED"


def test_request_id_is_kept_and_made(stub):
    _, call = stub.ServerLive.with_call(pb.ServerLiveRequest(), metadata=(("x-request-id", "abc"),))
    assert dict(call.trailing_metadata())["x-request-id"] == "abc"
    _, call = stub.ServerLive.with_call(pb.ServerLiveRequest())
    assert len(dict(call.trailing_metadata())["x-request-id"]) == 32


DATATYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
}


@pytest.mark.parametrize(("datatype", "dtype"), DATATYPES.items())
def test_raw_round_trip(datatype, dtype):
    array = np.array([[0, 1], [1, 0], [1, 1]]).astype(dtype)
    np.testing.assert_array_equal(from_raw(to_raw(array), datatype, array.shape, "t"), array)


def test_raw_is_a_view_not_a_copy():
    data = np.arange(4, dtype=np.float32).tobytes()
    array = from_raw(data, "FP32", [4], "t")
    assert not array.flags.owndata
    assert np.shares_memory(array, np.frombuffer(data, np.float32))


def test_bytes_round_trip():
    array = np.array([b"", b"usagi", b"\x00\xff" * 3], dtype=object)
    back = from_raw(to_raw(array), "BYTES", [3], "t")
    assert back.tolist() == array.tolist()


def test_typed_integers_stay_in_range():
    contents = pb.InferTensorContents(int_contents=[127, 128])
    with pytest.raises(Exception, match="outside INT8"):
        from_contents(contents, "INT8", [2], "t")
