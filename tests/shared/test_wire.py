"""ModelInfer read and written by its bytes, against protobuf and the usual way as oracles, with random messages."""

import random

import numpy as np
import pytest
from inference import open_inference_grpc_pb2 as pb

from shared.artifacts import Manifest, TensorSpec, Variant
from shared.errors import UsagiError
from shared.serving import wire
from shared.serving.batching import BatchResult
from shared.serving.inference_requests import read_query, to_response
from shared.serving.wire import InferPlans, cut, length_prefix

DTYPES = {"float32": "FP32", "int64": "INT64", "uint8": "UINT8", "float16": "FP16", "bool": "BOOL"}


def manifest_of(inputs, outputs, version=1):
    return Manifest(
        service="test", name="m", version=version, task="t", description="d", opset=20,
        inputs=tuple(TensorSpec(f"in{i}", dtype, (-1, *shape)) for i, (dtype, shape) in enumerate(inputs)),
        outputs=tuple(TensorSpec(f"out{i}", dtype, (-1, *shape)) for i, (dtype, shape) in enumerate(outputs)),
        variants={"fp32": Variant("model.onnx", "0" * 64, 1, {}, 8)},
    )  # fmt: skip


class Served:
    """What `to_response` asks of a variant."""

    def __init__(self, manifest):
        self.manifest, self.version, self.variant = manifest, str(manifest.version), "fp32"


def random_case(rng):
    """A manifest, a request that fits it, and arrays for its outputs."""

    def tensors():
        return [
            (rng.choice(list(DTYPES)), tuple(rng.randint(1, 5) for _ in range(rng.randint(0, 3))))
            for _ in range(rng.randint(1, 3))
        ]

    manifest, rows = manifest_of(tensors(), tensors()), rng.choice([1, 2, 7, 130])
    request = pb.ModelInferRequest(model_name="m", id=rng.choice(["", "a", "x" * 200, "日本"]))
    request.model_version = rng.choice(["", "1"])
    if rng.random() < 0.5:
        request.parameters["variant"].string_param = "fp32"
    for spec in manifest.inputs:
        shape = (rows, *spec.shape[1:])
        request.inputs.add(name=spec.name, datatype=DTYPES[spec.dtype], shape=shape)
        request.raw_input_contents.append(np.random.default_rng(1).integers(0, 2, shape).astype(spec.dtype).tobytes())
    if rng.random() < 0.3:
        request.outputs.add(name=manifest.outputs[-1].name)
    outputs = {
        spec.name: np.asfortranarray(
            np.random.default_rng(2).integers(0, 2, (rows, *spec.shape[1:])).astype(spec.dtype)
        )
        for spec in manifest.outputs
    }
    return manifest, request, outputs


@pytest.mark.parametrize("seed", range(60))
def test_a_second_request_is_read_and_answered_as_protobuf_would(seed):
    rng = random.Random(seed)
    manifest, request, outputs = random_case(rng)
    plans, message = InferPlans(), request.SerializeToString()
    assert plans.match(message) is None
    plans.learn(message, request, read_query(request, manifest), manifest)
    other = pb.ModelInferRequest.FromString(message)
    other.id = rng.choice(["", "another"])
    for index, raw in enumerate(other.raw_input_contents):
        other.raw_input_contents[index] = bytes(rng.choice([0, 1]) for _ in raw)
    seen = plans.match(other.SerializeToString())
    query = read_query(other, manifest)
    assert seen.feeds.keys() == query.feeds.keys()
    for name, array in query.feeds.items():
        assert seen.feeds[name].dtype == array.dtype
        np.testing.assert_array_equal(seen.feeds[name], array)
    for batch_size in (1, 200):
        result = BatchResult(outputs, batch_size, 0.0, 0.0)
        answer = seen.plan.answer(seen.id, "1", "fp32", result)
        assert pb.ModelInferResponse.FromString(answer) == to_response(other, query, Served(manifest), result)


def mutate(rng, message):
    changed = bytearray(message)
    for _ in range(rng.randint(1, 3)):
        kind, at = rng.randrange(4), rng.randrange(len(changed))
        if kind == 0:
            changed[at] = rng.randrange(256)
        elif kind == 1:
            del changed[at : at + rng.randint(1, 4)]
        elif kind == 2:
            changed[at:at] = rng.randbytes(rng.randint(1, 4))
        else:
            changed += changed[at:]
        if not changed:
            changed = bytearray(b"\0")
    return bytes(changed)


def test_whatever_bytes_come_protobuf_agrees_with_what_is_accepted():
    rng, accepted = random.Random(7), 0
    for _ in range(40):
        manifest, request, _ = random_case(rng)
        plans, message = InferPlans(), request.SerializeToString()
        plans.learn(message, request, read_query(request, manifest), manifest)
        for _ in range(250):
            mutated = mutate(rng, message)
            seen = plans.match(mutated)
            if seen is None:
                continue
            accepted += 1
            parsed = pb.ModelInferRequest.FromString(mutated)  # raises if protobuf refuses it
            query = read_query(parsed, manifest)
            assert parsed.id.encode() == seen.id
            for name, array in query.feeds.items():
                np.testing.assert_array_equal(seen.feeds[name], array)
    assert accepted > 100, "some mutations hit the values of a tensor only, and those count"


@pytest.mark.parametrize("length", [0, 1, 127, 128, 16_383, 16_384, 700_000, 2**28])
def test_length_prefixes(length):
    prefix = length_prefix(0x32, length)
    assert prefix[0] == 0x32
    assert wire._varint(prefix + b"\0", 1) == (length, len(prefix))


def request_of(**changes):
    request = pb.ModelInferRequest(model_name="m", **changes)
    request.inputs.add(name="in0", datatype="FP32", shape=[1, 2])
    request.raw_input_contents.append(bytes(8))
    return request


MANIFEST = manifest_of([("float32", (2,))], [("float32", (2,))])


@pytest.mark.parametrize(
    "change",
    [
        lambda request: request.parameters["timeout"].MergeFrom(pb.InferParameter(int64_param=5_000_000)),
        lambda request: request.parameters["binary_data_output"].MergeFrom(pb.InferParameter(bool_param=False)),
        lambda request: request.outputs.add(name="out0").parameters["classification"].MergeFrom(
            pb.InferParameter(int64_param=1)
        ),
        lambda request: request.outputs.extend([request.InferRequestedOutputTensor(name="out0")] * 600),
    ],
    ids=["timeout", "typed answer", "classification", "long header"],
)  # fmt: skip
def test_what_asks_for_more_always_takes_the_usual_way(change):
    request = request_of()
    change(request)
    plans, message = InferPlans(), request.SerializeToString()
    plans.learn(message, request, read_query(request, MANIFEST), MANIFEST)
    assert plans.match(message) is None


def test_typed_contents_and_what_is_no_message():
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="in0", datatype="FP32", shape=[1, 2]).contents.fp32_contents.extend([1, 2])
    assert cut(request.SerializeToString()) is None
    for message in (b"", b"\x3a", b"\x3a\xff", b"\x3a\x80\x80\x80\x80\x80\x01", b"\x3a\x05abc", b"\xff\xff"):
        assert cut(message) is None


def test_a_wrong_size_is_left_to_the_checks():
    request, plans = request_of(), InferPlans()
    plans.learn(request.SerializeToString(), request, read_query(request, MANIFEST), MANIFEST)
    request.raw_input_contents[0] = bytes(7)
    assert plans.match(request.SerializeToString()) is None
    with pytest.raises(UsagiError, match="7 raw bytes"):
        read_query(request, MANIFEST)


def test_callers_cannot_fill_memory_with_headers():
    plans = InferPlans()
    for number in range(2 * wire.MAX_PLANS):
        request = request_of(model_version=str(number))
        plans.learn(request.SerializeToString(), request, read_query(request, MANIFEST), MANIFEST)
    assert len(plans._plans) <= wire.MAX_PLANS
    assert plans.match(request.SerializeToString()) is not None
    plan = plans.match(request.SerializeToString()).plan
    for batch_size in range(3 * wire.MAX_ANSWERS):
        plan.answer(b"", "1", "fp32", BatchResult({"out0": np.zeros((1, 2), np.float32)}, batch_size, 0.0, 0.0))
    assert len(plan._answers) <= wire.MAX_ANSWERS
