"""inference.GRPCInferenceService, the Open Inference Protocol, over an Engine: every ONNX model takes plain tensors.

The request parameter `variant` chooses the weights, as `variant` does in the typed calls; the answer names both.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import grpc
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc

from shared.artifacts import Manifest, TensorSpec
from shared.errors import InvalidInput
from shared.serving.calls import deadline_of
from shared.serving.engine import Engine
from shared.serving.repository import State
from shared.serving.session import Array
from shared.serving.tensors import datatype_of, from_contents, from_raw, to_raw

PLATFORM = "onnxruntime_onnx"
Context = grpc.aio.ServicerContext[Any, Any]


def package_version() -> str:
    """Version of Usagi; `0` when it runs from a bare checkout."""
    try:
        return importlib.metadata.version("usagi")
    except importlib.metadata.PackageNotFoundError:
        return "0"


class OpenInferenceServicer(pb_grpc.GRPCInferenceServiceServicer):
    """The unary part of the Open Inference Protocol.

    Args:
        engine: runs the models.
        ready: says whether every start-up model is warm and the server is not draining.
    """

    def __init__(self, engine: Engine, ready: Any) -> None:
        self._engine = engine
        self._ready = ready

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        """Whoever can answer, lives."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        """Whether every start-up model is warm."""
        return pb.ServerReadyResponse(ready=bool(self._ready()))

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        """Whether the model can answer."""
        entry = self._engine.repository.find(_required(request.name, "name"), request.version)
        return pb.ModelReadyResponse(ready=entry.state in (State.READY, State.AVAILABLE))

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        """Name and version of the server."""
        return pb.ServerMetadataResponse(name=f"usagi-{self._engine.service}", version=package_version())

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        """Inputs and outputs of the model."""
        entry = self._engine.repository.find(_required(request.name, "name"), request.version)
        versions = [str(other.version) for other in self._engine.repository.versions() if other.name == entry.name]
        manifest = entry.manifest
        return pb.ModelMetadataResponse(
            name=entry.name,
            versions=versions,
            platform=PLATFORM,
            inputs=[_metadata(spec) for spec in manifest.inputs] if manifest else [],
            outputs=[_metadata(spec) for spec in manifest.outputs] if manifest else [],
        )

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        """Runs the model on the tensors of the request."""
        name = _required(request.model_name, "model_name")
        variant = request.parameters["variant"].string_param if "variant" in request.parameters else ""
        async with self._engine.repository.acquire(name, request.model_version, variant) as served:
            with served.batcher.admit():
                wanted = _wanted_outputs(request, served.manifest)
                feeds = _feeds(request, served.manifest)
                result = await served.batcher.submit(feeds, deadline_of(context))
        response = pb.ModelInferResponse(model_name=name, model_version=served.version, id=request.id)
        response.parameters["variant"].string_param = served.variant
        response.parameters["batch_size"].int64_param = result.batch_size
        for output in wanted:
            array = result.outputs[output]
            response.outputs.add(name=output, datatype=datatype_of(array.dtype.name), shape=array.shape)
            response.raw_output_contents.append(to_raw(array))
        return response


def _required(name: str, field: str) -> str:
    if not name:
        raise InvalidInput(field, "is empty, expected the name of a model")
    return name


def _metadata(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=datatype_of(spec.dtype), shape=spec.shape)


def _wanted_outputs(request: pb.ModelInferRequest, manifest: Manifest) -> list[str]:
    known = [spec.name for spec in manifest.outputs]
    for index, output in enumerate(request.outputs):
        if output.name not in known:
            raise InvalidInput(f"outputs[{index}].name", f"is `{output.name}`, the model has {', '.join(known)}")
    return [output.name for output in request.outputs] or known


def _feeds(request: pb.ModelInferRequest, manifest: Manifest) -> dict[str, Array]:
    """The inputs by name, checked against the manifest.

    Raises:
        InvalidInput: missing, unknown or repeated inputs; datatype or shape that the graph does not take.
    """
    specs = {spec.name: spec for spec in manifest.inputs}
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidInput(
            "raw_input_contents", f"has {len(raw)} entries, expected {len(request.inputs)}, one for every input"
        )
    feeds: dict[str, Array] = {}
    for index, tensor in enumerate(request.inputs):
        field = f"inputs[{index}]"
        spec = specs.get(tensor.name)
        if spec is None or tensor.name in feeds:
            problem = "given twice" if spec else f"unknown; the model has {', '.join(specs)}"
            raise InvalidInput(f"{field}.name", f"`{tensor.name}` is {problem}")
        _check_spec(tensor, spec, field)
        if raw:
            if tensor.HasField("contents"):
                raise InvalidInput(f"{field}.contents", "must be empty when raw_input_contents is used")
            feeds[tensor.name] = from_raw(raw[index], tensor.datatype, tensor.shape, f"raw_input_contents[{index}]")
        else:
            feeds[tensor.name] = from_contents(tensor.contents, tensor.datatype, tensor.shape, field)
    missing = [name for name in specs if name not in feeds]
    if missing:
        raise InvalidInput("inputs", f"lacks {', '.join(missing)}")
    rows = {array.shape[0] for array in feeds.values()}
    if len(rows) != 1 or 0 in rows:
        raise InvalidInput("inputs", f"have {sorted(rows)} rows, expected the same number for all, 1 or more")
    return feeds


def _check_spec(tensor: pb.ModelInferRequest.InferInputTensor, spec: TensorSpec, field: str) -> None:
    expected = datatype_of(spec.dtype)
    if tensor.datatype != expected:
        raise InvalidInput(f"{field}.datatype", f"is `{tensor.datatype}`, expected {expected}")
    fits = len(tensor.shape) == len(spec.shape) and all(
        want in (-1, size) for size, want in zip(tensor.shape, spec.shape, strict=True)
    )
    if not fits:
        raise InvalidInput(f"{field}.shape", f"is {list(tensor.shape)}, expected {list(spec.shape)}")
