"""Requests for any RPC, by its descriptor: valid ones, ones with a wrong field, damaged bytes, and random bytes."""

from __future__ import annotations

import random
import string
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from inference import open_inference_grpc_pb2 as oip
from usagi.model.v1 import model_service_pb2 as model_pb
from usagi.vision.v1 import vision_service_pb2 as pb

from tests.fuzz.pictures import any_picture, corpus
from tests.fuzz.server import CLASSIFIER, IDENTITIES, SIDE

MODELS = (CLASSIFIER, "affine", *IDENTITIES)
DECOYS = ("half", "flags")
"""What right requests to unload name, so that other calls still find their model."""
SERVICES = ("", "usagi.vision.v1.VisionService", "inference.GRPCInferenceService", "grpc.health.v1.Health")
DATATYPES = ("BOOL", "UINT8", "INT8", "INT32", "INT64", "FP16", "FP32", "FP64", "BF16", "BYTES", "", "fp32", "INT128")
STRINGS = (
    *("", "\0", " ", "\n", "-1", "0", "1", "2", "01", "1e3", "٣", "²", "99999999999999999999", "auto", "fp32", "int8"),
    *("../../etc/passwd", "/", "%s%n{0}", "🐇", "\u202e", "a" * 200, "é" * 5_000, "a" * 100_000, "*", "nobody"),
    *MODELS,
)
_INTEGERS = (0, 1, -1, 2, 127, 128, 255, 256, 2**31 - 1, -(2**31), 2**31, 2**32 - 1, 2**63 - 1, -(2**63), 2**64 - 1)
_LIMITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}
FLOATS = (0.0, -0.0, 1.0, float("nan"), float("inf"), -float("inf"), 5e-324, 1e308, -1e-45)
MAX_DEPTH = 4


def request_bytes(kind: type[Message], rng: random.Random) -> tuple[str, bytes]:
    """What was done, and one message for an RPC that takes `kind`."""
    draw = rng.random()
    if draw < 0.12:
        return "valid", valid(kind, rng).SerializeToString()
    if draw < 0.62:
        return "mutated field", mutated(valid(kind, rng), rng).SerializeToString()
    if draw < 0.72:
        return "random fields", arbitrary(kind, rng).SerializeToString()
    if draw < 0.92:
        return "damaged bytes", damaged(valid(kind, rng).SerializeToString(), rng)
    return "random bytes", rng.randbytes(int(rng.expovariate(1 / 40)))


def valid(kind: type[Message], rng: random.Random) -> Message:
    """A message that the server should take: made by hand where there is a way to, else by the fields' names."""
    made = VALID.get(kind.DESCRIPTOR.full_name)
    if made is not None:
        parsed: Message = kind.FromString(made(rng).SerializeToString())  # of the pool that reflection filled
        return parsed
    message = kind()
    for field in kind.DESCRIPTOR.fields:
        if rng.random() < 0.7:
            _fill(message, field, rng, _likely, 0)
    return message


def arbitrary(kind: type[Message], rng: random.Random) -> Message:
    """A message of that type with any values."""
    message = kind()
    _fill_all(message, rng, 0)
    return message


def mutated(message: Message, rng: random.Random) -> Message:
    """The message with one to three fields, at any depth, changed to something unlikely."""
    for _ in range(rng.randint(1, 3)):
        _mutate(message, rng, 0)
    return message


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Serialised bytes, cut, flipped, repeated, spliced, or with text that is no UTF-8."""
    return rng.choice(DAMAGES)(data, rng)


def _mutate(message: Message, rng: random.Random, depth: int) -> None:
    fields = message.DESCRIPTOR.fields
    if not fields:
        return
    field = rng.choice(fields)
    if field.message_type is not None and depth < MAX_DEPTH and rng.random() < 0.8:
        inside = _submessages(message, field)
        if inside:
            _mutate(rng.choice(inside), rng, depth + 1)
            return
    if field.is_repeated and rng.random() < 0.4:
        _reorder(message, field, rng)
        return
    _fill(message, field, rng, _unlikely, depth)


def _submessages(message: Message, field: FieldDescriptor) -> list[Message]:
    value = getattr(message, field.name)
    if _is_map(field):
        return [value[key] for key in value] if _map_value(field).message_type else []
    if field.is_repeated:
        return list(value)
    return [value] if message.HasField(field.name) else []


def _reorder(message: Message, field: FieldDescriptor, rng: random.Random) -> None:
    """Doubles, drops or multiplies the entries of a repeated field."""
    values = getattr(message, field.name)
    if _is_map(field) or rng.random() < 0.3:
        message.ClearField(field.name)
        return
    kept = list(values)
    if not kept:
        return
    entry = rng.choice(kept)
    for _ in range(rng.choice((1, 1, 2, 50))):
        values.append(entry)


def _fill_all(message: Message, rng: random.Random, depth: int) -> None:
    for field in message.DESCRIPTOR.fields:
        if rng.random() < 0.5:
            _fill(message, field, rng, _unlikely if rng.random() < 0.5 else _likely, depth)


Scalar = Callable[[FieldDescriptor, random.Random], Any]


def _fill(message: Message, field: FieldDescriptor, rng: random.Random, scalar: Scalar, depth: int) -> None:
    if _is_map(field):
        entries, value = getattr(message, field.name), _map_value(field)
        key = scalar(field.message_type.fields_by_name["key"], rng)
        if value.message_type is not None:
            _fill_all(entries[key], rng, depth + 1)
        else:
            entries[key] = scalar(value, rng)
    elif field.message_type is not None:
        if depth < MAX_DEPTH:
            value = getattr(message, field.name)
            inner = value.add() if field.is_repeated else value
            inner.SetInParent()
            _fill_all(inner, rng, depth + 1)
    elif field.is_repeated:
        count = rng.choice((0, 1, 1, 2, 3, 17))
        getattr(message, field.name).extend(scalar(field, rng) for _ in range(count))
    else:
        setattr(message, field.name, scalar(field, rng))


def _likely(field: FieldDescriptor, rng: random.Random) -> Any:
    """A value that the name of the field asks for."""
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING and field.type != FieldDescriptor.TYPE_BYTES:
        if field.name in ("name", "model_name", "model"):
            return rng.choice(MODELS)
        if field.name == "service":
            return rng.choice(SERVICES)
        return rng.choice(("", "", "1", "fp32", *SERVICES))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return rng.choice(corpus())
    if field.cpp_type in _LIMITS:
        return rng.randint(0, 3)
    return _unlikely(field, rng)


def _unlikely(field: FieldDescriptor, rng: random.Random) -> Any:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return rng.choice((any_picture, any_picture, any_picture, _any_bytes))(rng)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        if field.name == "datatype":
            return rng.choice(DATATYPES)
        return (
            rng.choice(STRINGS) if rng.random() < 0.9 else "".join(rng.choices(string.printable, k=rng.randrange(40)))
        )
    if field.cpp_type in _LIMITS:
        low, high = _LIMITS[field.cpp_type]
        return rng.choice([value for value in _INTEGERS if low <= value <= high])
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    return rng.choice(FLOATS)


def _any_bytes(rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 4, 15, 16, 17, 8, 1_000))) if rng.random() < 0.99 else bytes(1_000_000)


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _map_value(field: FieldDescriptor) -> FieldDescriptor:
    return field.message_type.fields_by_name["value"]


# Damage to serialised bytes


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(rng.randint(1, 6)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _double(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    piece = data[start : start + rng.randint(1, 200)]
    return data[:start] + piece * rng.choice((2, 3, 50)) + data[start:]


def _no_utf8(data: bytes, rng: random.Random) -> bytes:
    """A byte that begins no UTF-8 character in place of a letter, which is often inside a string."""
    letters = [place for place, byte in enumerate(data) if chr(byte).isalpha() and byte < 128]
    if not letters:
        return b"\xff\xfe"
    place = rng.choice(letters)
    return data[:place] + rng.choice((b"\xff", b"\xc0", b"\xed")) + data[place + 1 :]


def _nested(data: bytes, rng: random.Random) -> bytes:
    """Groups or messages inside each other, deeper than parsers go."""
    return bytes([rng.choice((0x0B, 0x0A, 0x13, 0x2B))]) * rng.choice((50, 200, 20_000))


def _long_varint(data: bytes, rng: random.Random) -> bytes:
    return data + bytes([rng.randrange(256)]) + b"\xff" * rng.randint(5, 20)


DAMAGES = (_flip, _flip, _cut, _double, _no_utf8, _nested, _long_varint)


# Valid by hand


def _classify(rng: random.Random) -> Message:
    request = pb.ClassifyImageRequest(image=any_picture(rng) if rng.random() < 0.7 else rng.choice(corpus()))
    if rng.random() < 0.3:
        request.top_k = rng.randint(1, 3)
    if rng.random() < 0.2:
        request.model = CLASSIFIER
        request.variant = rng.choice(("", "auto", "fp32", "int8"))
    return request


def _classify_of_stream(rng: random.Random) -> Message:
    return pb.ClassifyImagesRequest(id=str(rng.randrange(100)), request=_classify(rng))


def _control(kind: type[Message], field: str) -> Callable[[random.Random], Message]:
    return lambda rng: kind(**{field: rng.choice(DECOYS)})


def _infer(rng: random.Random) -> Message:
    name = rng.choice(MODELS)
    request = oip.ModelInferRequest(model_name=name, id=str(rng.randrange(100)))
    rows = rng.choice((1, 1, 2, 3, 9))
    datatype, shape, raw = _tensor(name, rows, rng)
    tensor = request.inputs.add(name="image" if name == CLASSIFIER else "x", datatype=datatype, shape=shape)
    if datatype == "FP32" and rng.random() < 0.3:
        tensor.contents.fp32_contents.extend(np.frombuffer(raw, np.float32).tolist())
    elif datatype == "INT64" and rng.random() < 0.5:
        tensor.contents.int64_contents.extend(np.frombuffer(raw, np.int64).tolist())
    else:
        request.raw_input_contents.append(raw)
    if rng.random() < 0.3:
        output = request.outputs.add(name="logits" if name == CLASSIFIER else "y")
        if rng.random() < 0.5:
            output.parameters["classification"].int64_param = rng.randint(1, 3)
    if rng.random() < 0.3:
        request.parameters["binary_data_output"].bool_param = False
    return request


def _tensor(name: str, rows: int, rng: random.Random) -> tuple[str, list[int], bytes]:
    if name == CLASSIFIER:
        side = rng.choice((1, SIDE))
        return "FP32", [rows, 3, side, side], np.ones((rows, 3, side, side), np.float32).tobytes()
    if name == "affine":
        return "FP32", [rows, 4], np.arange(rows * 4, dtype=np.float32).tobytes()
    if name == "text":
        return "BYTES", [rows, 2], struct.pack("<I2s", 2, b"ab") * rows * 2
    dtype = IDENTITIES[name][1]
    datatype = {"float16": "FP16", "uint8": "UINT8", "int64": "INT64", "bool": "BOOL"}[dtype]
    return datatype, [rows, 2], np.ones((rows, 2), dtype).tobytes()


VALID: dict[str, Callable[[random.Random], Message]] = {
    "usagi.vision.v1.ClassifyImageRequest": _classify,
    "usagi.vision.v1.ClassifyImagesRequest": _classify_of_stream,
    "inference.ModelInferRequest": _infer,
    "inference.RepositoryModelUnloadRequest": _control(oip.RepositoryModelUnloadRequest, "model_name"),
    "usagi.model.v1.UnloadModelRequest": _control(model_pb.UnloadModelRequest, "name"),
}
"""By full name of the message; what is not here is filled by the names of its fields."""
