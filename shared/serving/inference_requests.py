"""Between the Open Inference Protocol's messages and numpy: what a ModelInferRequest asks for, and the answer to it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from inference import open_inference_grpc_pb2 as pb

from shared.artifacts import Manifest, TensorSpec
from shared.errors import InvalidInput, NotSupported
from shared.serving.batching import BatchResult
from shared.serving.served import Served
from shared.serving.session import Array
from shared.serving.tensors import datatype_of, decode_text, from_contents, from_raw, to_contents, to_raw

Parameters = Mapping[str, pb.InferParameter]
_SHARED_MEMORY = "shared_memory_region"
_SEQUENCE = ("sequence_id", "sequence_start", "sequence_end")


@dataclass(frozen=True)
class WantedOutput:
    """An output that the caller wants: the tensor, or of a classification the best `top_k` as text."""

    spec: TensorSpec
    top_k: int = 0


@dataclass(frozen=True)
class InferenceQuery:
    """A checked request."""

    feeds: dict[str, Array]
    outputs: list[WantedOutput]
    typed: bool


def variant_of(request: pb.ModelInferRequest) -> str:
    """The parameter `variant`; empty without it."""
    return str(_parameter(request.parameters, "variant", "string_param", default=""))


def deadline_within(request: pb.ModelInferRequest, deadline: float) -> float:
    """The earlier of the call's deadline and the parameter `timeout`, microseconds, 0 for none."""
    timeout = int(_parameter(request.parameters, "timeout", "int64_param", "uint64_param", default=0))
    if timeout < 0:
        raise InvalidInput("parameters[timeout]", f"is {timeout}, expected microseconds, 0 for none")
    return min(deadline, time.monotonic() + timeout / 1e6) if timeout else deadline


def read_query(request: pb.ModelInferRequest, manifest: Manifest) -> InferenceQuery:
    """Checks a request against the model.

    Raises:
        InvalidInput: missing, unknown or repeated tensors; a datatype, shape or size that does not fit; a priority.
        NotSupported: sequences and shared memory.
    """
    _refuse_extensions(request)
    typed = not _parameter(request.parameters, "binary_data_output", "bool_param", default=True)
    return InferenceQuery(_feeds(request, manifest), _wanted_outputs(request, manifest), typed)


def to_response(
    request: pb.ModelInferRequest, query: InferenceQuery, served: Served, result: BatchResult
) -> pb.ModelInferResponse:
    """The answer: raw contents, unless the parameter `binary_data_output` is false."""
    response = pb.ModelInferResponse(model_name=request.model_name, model_version=served.version, id=request.id)
    response.parameters["variant"].string_param = served.variant
    response.parameters["batch_size"].int64_param = result.batch_size
    if result.cached:
        response.parameters["cached"].bool_param = True
    if result.exit_steps:
        response.parameters["exit_step"].string_param = ",".join(result.exit_steps)
    for wanted in query.outputs:
        array, datatype = result.outputs[wanted.spec.name], datatype_of(wanted.spec.dtype)
        if wanted.top_k:
            array, datatype = _classes(array, wanted.top_k, served.manifest), "BYTES"
        output = response.outputs.add(name=wanted.spec.name, datatype=datatype, shape=array.shape)
        if query.typed:
            output.contents.CopyFrom(to_contents(array, datatype, "parameters[binary_data_output]"))
        else:
            response.raw_output_contents.append(to_raw(array))
    return response


def graph_failure(error: Exception) -> InvalidInput | None:
    """What ONNX Runtime says of inputs that fit the declared shapes and still do not run; None for other errors."""
    if type(error).__module__.partition(".")[0] != "onnxruntime":
        return None
    reason = str(error).rpartition("Status Message:")[2].rpartition("/onnxruntime/")[2].strip()
    return InvalidInput("inputs", f"the graph does not run on these values: {reason[:300]}")


def _parameter(parameters: Parameters, name: str, *kinds: str, default: Any) -> Any:
    if name not in parameters:
        return default
    kind = parameters[name].WhichOneof("parameter_choice")
    if kind not in kinds:
        raise InvalidInput(f"parameters[{name}]", f"is {kind or 'empty'}, expected {' or '.join(kinds)}")
    return getattr(parameters[name], kind)


def _refuse_extensions(request: pb.ModelInferRequest) -> None:
    if any(name in request.parameters for name in _SEQUENCE):
        raise NotSupported("sequences of stateful models are not supported; leave out the sequence_* parameters")
    if _parameter(request.parameters, "priority", "int64_param", "uint64_param", default=0):
        raise InvalidInput("parameters[priority]", "is not supported: queues are first in, first out; leave it out")
    parameters = [tensor.parameters for tensor in request.inputs] + [output.parameters for output in request.outputs]
    if any(_SHARED_MEMORY in of_tensor for of_tensor in parameters):
        raise NotSupported("shared memory is not supported; send tensors in raw_input_contents")


def _wanted_outputs(request: pb.ModelInferRequest, manifest: Manifest) -> list[WantedOutput]:
    known = {spec.name: spec for spec in manifest.outputs}
    wanted: list[WantedOutput] = []
    for index, output in enumerate(request.outputs):
        field = f"outputs[{index}]"
        if output.name not in known:
            raise InvalidInput(f"{field}.name", f"is `{output.name}`, the model has {', '.join(known)}")
        spec = known[output.name]
        top_k = int(_parameter(output.parameters, "classification", "int64_param", "uint64_param", default=0))
        if top_k < 0 or (top_k and (spec.dtype in ("object", "bool", "bfloat16") or len(spec.shape) < 2)):
            raise InvalidInput(
                f"{field}.parameters[classification]",
                f"is {top_k} for a {datatype_of(spec.dtype)} of {len(spec.shape)} dimensions, "
                "expected 1 or more for numbers of shape [batch, classes]",
            )
        wanted.append(WantedOutput(spec, top_k))
    return wanted or [WantedOutput(spec) for spec in manifest.outputs]


def _classes(array: Array, top_k: int, manifest: Manifest) -> Array:
    """The best `top_k` of each row as `value:index[:label]`, as Triton writes them; `[B, C...]` -> `[B, top_k]`."""
    flat = array.reshape(array.shape[0], -1)
    best = np.argsort(-flat.astype(np.float64), axis=1, kind="stable")[:, :top_k]
    texts = np.empty(best.shape, dtype=object)
    for row, column in np.ndindex(*best.shape):
        index = int(best[row, column])
        label = f":{manifest.labels[index]}" if index < len(manifest.labels) else ""
        texts[row, column] = f"{float(flat[row, index]):f}:{index}{label}"
    return texts


def _feeds(request: pb.ModelInferRequest, manifest: Manifest) -> dict[str, Array]:
    specs = {spec.name: spec for spec in manifest.inputs}
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidInput(
            "raw_input_contents", f"has {len(raw)} entries, expected {len(request.inputs)}, one for every input"
        )
    feeds: dict[str, Array] = {}
    for index, tensor in enumerate(request.inputs):
        spec = specs.get(tensor.name)
        if spec is None or tensor.name in feeds:
            problem = "given twice" if spec else f"unknown; the model has {', '.join(specs)}"
            raise InvalidInput(f"inputs[{index}].name", f"`{tensor.name}` is {problem}")
        feeds[tensor.name] = _feed(request, index, spec)
    missing = [name for name in specs if name not in feeds]
    if missing:
        raise InvalidInput("inputs", f"lacks {', '.join(missing)}")
    if manifest.batchable:
        rows = {array.shape[0] for array in feeds.values()}
        if len(rows) != 1 or 0 in rows:
            raise InvalidInput("inputs", f"have {sorted(rows)} rows, expected the same number for all, 1 or more")
    return feeds


def _feed(request: pb.ModelInferRequest, index: int, spec: TensorSpec) -> Array:
    tensor, field = request.inputs[index], f"inputs[{index}]"
    _check_spec(tensor, spec, field)
    name = f"`{tensor.name}`"
    if not request.raw_input_contents:
        array = from_contents(tensor.contents, tensor.datatype, tensor.shape, field, name)
    elif tensor.HasField("contents"):
        raise InvalidInput(f"{field}.contents", "must be empty when raw_input_contents is used")
    else:
        field = f"raw_input_contents[{index}]"
        array = from_raw(request.raw_input_contents[index], tensor.datatype, tensor.shape, field, name)
    return decode_text(array, field, name) if tensor.datatype == "BYTES" else array


def _check_spec(tensor: pb.ModelInferRequest.InferInputTensor, spec: TensorSpec, field: str) -> None:
    expected = datatype_of(spec.dtype)
    if tensor.datatype != expected:
        raise InvalidInput(f"{field}.datatype", f"is `{tensor.datatype}`, expected {expected}")
    fits = len(tensor.shape) == len(spec.shape) and all(
        want in (-1, size) for size, want in zip(tensor.shape, spec.shape, strict=True)
    )
    if not fits:
        raise InvalidInput(f"{field}.shape", f"is {list(tensor.shape)[:16]}, expected {list(spec.shape)}")
