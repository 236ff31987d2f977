"""ModelInfer without protobuf on the hot path: requests that only differ in their tensors are read by their bytes.

A caller sends the same header (model, tensors' names, types and shapes) again and again before other tensors. So what
protobuf and our checks made of a header is kept as a plan: the next request that begins with the same bytes is known to
be as good, and its tensors are views into the message. Whatever is not of this plain form goes the usual way.

Encodings: https://protobuf.dev/programming-guides/encoding; `tests/shared/test_wire.py` has protobuf as its oracle.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from inference import open_inference_grpc_pb2 as pb

from shared.artifacts import Manifest
from shared.serving.batching import BatchResult
from shared.serving.inference_requests import InferenceQuery, WantedOutput, variant_of
from shared.serving.session import Array
from shared.serving.tensors import datatype_of

MAX_HEADER = 4096
"""Bytes of a header that is worth keeping."""
MAX_PLANS = 512
"""Of one process, all models together; then it begins anew."""
MAX_ANSWERS = 64
"""Heads of answers of one plan: one for each size of batch that it ran in."""
_ID, _RAW_INPUT, _RAW_OUTPUT = 0x1A, 0x3A, 0x32  # field << 3 | 2, length-delimited
_HEADER = frozenset((0x0A, 0x12, 0x22, 0x2A, 0x32))  # model_name, model_version, parameters, inputs, outputs


class Parts(NamedTuple):
    """A ModelInferRequest cut at its top: what comes before the raw contents, without `id`, and where they lie."""

    header: bytes
    id: bytes
    spans: list[tuple[int, int]]


def cut(message: bytes) -> Parts | None:
    """Cuts a serialised ModelInferRequest; None unless its raw contents come last, as protobuf's writers put them."""
    position, end, first_raw = 0, len(message), 0
    id_begin = id_end = id_body = 0
    spans: list[tuple[int, int]] = []
    try:
        while position < end:
            tag, length, body = message[position], message[position + 1], position + 2
            if length & 0x80:
                length, body = _varint(message, position + 1)
            stop = body + length
            if stop > end:
                return None
            if tag == _RAW_INPUT:
                first_raw = first_raw or position
                spans.append((body, stop))
            elif spans:
                return None
            elif tag == _ID and not id_end:
                id_begin, id_body, id_end = position, body, stop
            elif tag not in _HEADER:
                return None
            position = stop
    except IndexError:
        return None
    if not spans or first_raw > MAX_HEADER:
        return None
    if id_end:
        return Parts(message[:id_begin] + message[id_end:first_raw], message[id_body:id_end], spans)
    return Parts(message[:first_raw], b"", spans)


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """A varint of at most 5 bytes, and where it ends; IndexError for a longer one, as for one that is cut off."""
    value = 0
    for shift in (0, 7, 14, 21, 28):
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise IndexError


def length_prefix(tag: int, length: int) -> bytes:
    """A field's tag and length."""
    written = bytearray((tag,))
    while length > 0x7F:
        written.append(length & 0x7F | 0x80)
        length >>= 7
    written.append(length)
    return bytes(written)


@dataclass(frozen=True)
class TensorPlan:
    """An input of a header that was checked."""

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    count: int
    size: int


@dataclass(frozen=True)
class InferPlan:
    """What a header means, checked against `manifest`."""

    model_name: str
    model_version: str
    variant: str
    manifest: Manifest
    inputs: tuple[TensorPlan, ...]
    outputs: tuple[WantedOutput, ...]
    _answers: dict[tuple[object, ...], bytes] = field(default_factory=dict)

    def feeds(self, message: bytes, spans: list[tuple[int, int]]) -> dict[str, Array] | None:
        """The inputs as views into `message`; None if they are not of the sizes that the header says."""
        if len(spans) != len(self.inputs):
            return None
        feeds: dict[str, Array] = {}
        for tensor, (begin, stop) in zip(self.inputs, spans, strict=True):
            if stop - begin != tensor.size:
                return None
            array = np.frombuffer(message, tensor.dtype, tensor.count, begin)
            feeds[tensor.name] = array.reshape(tensor.shape)
        return feeds

    def answer(self, request_id: bytes, version: str, variant: str, result: BatchResult) -> bytes:
        """A serialised ModelInferResponse, with the fields that `to_response` sets."""
        arrays = [result.outputs[wanted.spec.name] for wanted in self.outputs]
        key = (result.batch_size, result.cached, version, variant, *[array.shape for array in arrays])
        head = self._answers.get(key)
        if head is None:
            if len(self._answers) >= MAX_ANSWERS:
                self._answers.clear()
            head = self._answers[key] = self._head(version, variant, result, arrays)
        pieces: list[bytes | memoryview] = [head]
        if request_id:
            pieces += [length_prefix(_ID, len(request_id)), request_id]
        for array in arrays:
            pieces += [
                length_prefix(_RAW_OUTPUT, array.nbytes),
                array.data if array.flags.c_contiguous else array.tobytes(),
            ]
        return b"".join(pieces)

    def _head(self, version: str, variant: str, result: BatchResult, arrays: list[Array]) -> bytes:
        response = pb.ModelInferResponse(model_name=self.model_name, model_version=version)
        response.parameters["variant"].string_param = variant
        response.parameters["batch_size"].int64_param = result.batch_size
        if result.cached:
            response.parameters["cached"].bool_param = True
        for wanted, array in zip(self.outputs, arrays, strict=True):
            response.outputs.add(name=wanted.spec.name, datatype=datatype_of(wanted.spec.dtype), shape=array.shape)
        return response.SerializeToString()


class Match(NamedTuple):
    """A request whose header was seen: what it means, its inputs, its id."""

    plan: InferPlan
    feeds: dict[str, Array]
    id: bytes


class InferPlans:
    """The plans of one process, by header."""

    def __init__(self) -> None:
        self._plans: dict[bytes, InferPlan] = {}

    def match(self, message: bytes) -> Match | None:
        """What a request means if its header was seen; None for one that must be parsed and checked."""
        parts = cut(message)
        if parts is None or not parts.id.isascii():  # protobuf checks that text is UTF-8
            return None
        plan = self._plans.get(parts.header)
        feeds = None if plan is None else plan.feeds(message, parts.spans)
        return None if plan is None or feeds is None else Match(plan, feeds, parts.id)

    def learn(self, message: bytes, request: pb.ModelInferRequest, query: InferenceQuery, manifest: Manifest) -> None:
        """Keeps what `read_query` made of a request, if the next one like it can be read by its bytes.

        Args:
            message: the request as it came.
            request: the same, parsed.
            query: its meaning.
            manifest: of the version that it was checked against.
        """
        parts = cut(message)
        if parts is None or query.typed or set(request.parameters) - {"variant"}:
            return
        if any(wanted.top_k or wanted.spec.dtype == "object" for wanted in query.outputs):
            return
        if any(array.dtype == np.object_ for array in query.feeds.values()):
            return
        if len(self._plans) >= MAX_PLANS:
            self._plans.clear()
        tensors = tuple(
            TensorPlan(name, array.dtype, array.shape, array.size, array.nbytes) for name, array in query.feeds.items()
        )
        name, version, variant = request.model_name, request.model_version, variant_of(request)
        self._plans[parts.header] = InferPlan(name, version, variant, manifest, tensors, tuple(query.outputs))
