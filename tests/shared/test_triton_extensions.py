"""What Triton adds to the protocol: streams, statistics, more datatypes, parameters; against a real server."""

import time

import grpc
import numpy as np
import pytest
from google.rpc import code_pb2
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc
from onnx import TensorProto

from shared.serving.config import ServingConfig
from shared.testing.graphs import publish_affine, publish_identity
from shared.testing.server import running_server


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    publish_affine(root)
    for name, element, dtype in (
        ("text", TensorProto.STRING, "object"),
        ("brain", TensorProto.BFLOAT16, "bfloat16"),
        ("half", TensorProto.FLOAT16, "float16"),
        ("flag", TensorProto.BOOL, "bool"),
    ):
        publish_identity(root, element, dtype, name=name)
    config = ServingConfig(model_roots=(root,), rescan_seconds=600, threads=1)
    with running_server("test", config) as running, grpc.insecure_channel(running.address) as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel)


def affine(value=1.0, identity="", name="affine"):
    request = pb.ModelInferRequest(model_name=name, id=identity)
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(np.full((1, 4), value, np.float32).tobytes())
    return request


def pair(name, datatype, raw):
    request = pb.ModelInferRequest(model_name=name)
    request.inputs.add(name="x", datatype=datatype, shape=[1, 2])
    request.raw_input_contents.append(raw)
    return request


def refusal(call, request):
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    return caught.value.code().name, caught.value.details()


@pytest.mark.parametrize(
    ("name", "datatype", "raw"),
    [
        ("brain", "BF16", np.array([0x3FC0, 0xC010], np.uint16).tobytes()),
        ("half", "FP16", np.array([1.5, -2.25], np.float16).tobytes()),
        ("flag", "BOOL", b"\x01\x00"),
        ("text", "BYTES", b"\x02\0\0\0ab\x00\0\0\0"),
    ],
)
def test_raw_contents_come_back(stub, name, datatype, raw):
    answer = stub.ModelInfer(pair(name, datatype, raw))
    assert answer.outputs[0].datatype == datatype
    assert answer.raw_output_contents[0] == raw


def test_wrong_sizes_name_the_tensor(stub):
    code, message = refusal(stub.ModelInfer, pair("brain", "BF16", b"123"))
    assert code == "INVALID_ARGUMENT"
    assert "`x` has 3 raw bytes, expected 4" in message
    code, message = refusal(stub.ModelInfer, pair("text", "BYTES", b"\x01\0\0\0\xff\x00\0\0\0"))
    assert code == "INVALID_ARGUMENT"
    assert "`x` has an element that is not UTF-8" in message


def test_typed_answers_on_request(stub):
    request = affine(3.0)
    request.parameters["binary_data_output"].bool_param = False
    answer = stub.ModelInfer(request)
    assert list(answer.outputs[0].contents.fp32_contents) == [6.0] * 4
    assert not answer.raw_output_contents
    request = pair("half", "FP16", bytes(4))
    request.parameters["binary_data_output"].bool_param = False
    assert refusal(stub.ModelInfer, request)[0] == "INVALID_ARGUMENT"


def test_stream_keeps_the_order_and_survives_errors(stub):
    requests = [affine(number, str(number), "nope" if number == 5 else "affine") for number in range(200)]
    answers = list(stub.ModelStreamInfer(iter(requests), timeout=30))
    assert [answer.infer_response.id for answer in answers] == [str(number) for number in range(200)]
    assert [number for number, answer in enumerate(answers) if answer.error_message] == [5]
    assert answers[5].infer_response.parameters["error_code"].string_param == code_pb2.Code.Name(code_pb2.NOT_FOUND)
    for number, answer in enumerate(answers):
        if number != 5:
            assert np.frombuffer(answer.infer_response.raw_output_contents[0], np.float32)[0] == 2.0 * number


def test_stream_ends_with_the_status_when_asked(stub):
    metadata = (("triton_grpc_error", "true"),)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.ModelStreamInfer(iter([affine(name="nope")]), metadata=metadata, timeout=30))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_timeout_parameter(stub):
    request = affine()
    request.parameters["timeout"].int64_param = -1
    assert refusal(stub.ModelInfer, request)[0] == "INVALID_ARGUMENT"
    request.parameters["timeout"].string_param = "soon"
    assert refusal(stub.ModelInfer, request)[0] == "INVALID_ARGUMENT"
    request.parameters["timeout"].uint64_param = 1
    assert refusal(stub.ModelInfer, request)[0] == "DEADLINE_EXCEEDED"
    request.parameters["timeout"].uint64_param = 60_000_000
    assert stub.ModelInfer(request).outputs


def test_statistics_count_requests_runs_and_failures(stub):
    def ask():
        return stub.ModelStatistics(pb.ModelStatisticsRequest(name="half", version="1")).model_stats[0]

    before, began = ask(), time.time()
    for _ in range(3):
        stub.ModelInfer(pair("half", "FP16", bytes(4)))
    assert refusal(stub.ModelInfer, pair("half", "FP16", bytes(3)))[0] == "INVALID_ARGUMENT"
    after = ask()
    assert after.inference_count - before.inference_count == 3
    assert after.execution_count - before.execution_count == 3
    assert after.inference_stats.success.count - before.inference_stats.success.count == 3
    assert after.inference_stats.fail.count - before.inference_stats.fail.count == 1
    assert after.inference_stats.queue.count - before.inference_stats.queue.count == 3
    assert [batch.batch_size for batch in after.batch_stats] == [1]
    assert after.last_inference >= int(began * 1000)
    assert len(stub.ModelStatistics(pb.ModelStatisticsRequest()).model_stats) == 5
    assert refusal(stub.ModelStatistics, pb.ModelStatisticsRequest(name="nope"))[0] == "NOT_FOUND"
