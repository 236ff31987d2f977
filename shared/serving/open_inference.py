"""inference.GRPCInferenceService, the Open Inference Protocol, over an Engine: every ONNX model takes plain tensors.

The request parameter `variant` chooses the weights, as `variant` does in the typed calls; the answer names both.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.rpc import code_pb2
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc

from shared.artifacts import TensorSpec
from shared.errors import InvalidInput, ModelUnavailable, NotSupported
from shared.serving.batching import BatchResult
from shared.serving.calls import deadline_of
from shared.serving.engine import Engine
from shared.serving.guarded import parse_message
from shared.serving.inference_reports import answers, index_entry, model_config, model_statistics, platform_of
from shared.serving.inference_requests import deadline_within, graph_failure, read_query, to_response, variant_of
from shared.serving.repository import ServedVariant
from shared.serving.served import Served
from shared.serving.session import Array
from shared.serving.status import to_status
from shared.serving.streams import answer_in_order
from shared.serving.tensors import datatype_of
from shared.serving.wire import InferPlans

log = logging.getLogger(__name__)

EXTENSIONS = (
    *("binary_tensor_data", "classification", "model_configuration", "model_repository"),
    *("parameters", "statistics"),
)
UNSUPPORTED = (
    *(f"{kind}SharedMemory{verb}" for kind in ("System", "Cuda") for verb in ("Status", "Register", "Unregister")),
    *("TraceSetting", "LogSettings"),
)
"""RPCs of Triton that are refused with UNIMPLEMENTED."""
STREAM_LIMIT = 64
"""Requests of one stream in work at once."""
Context = grpc.aio.ServicerContext[Any, Any]


def package_version() -> str:
    """Version of Usagi; `0` when it runs from a bare checkout."""
    try:
        return importlib.metadata.version("usagi")
    except importlib.metadata.PackageNotFoundError:
        return "0"


class OpenInferenceServicer(pb_grpc.GRPCInferenceServiceServicer):
    """The Open Inference Protocol with what Triton adds to it.

    Args:
        engine: runs the models.
        ready: says whether every start-up model is warm and the server is not draining.
    """

    def __init__(self, engine: Engine, ready: Any) -> None:
        self._engine = engine
        self._ready = ready
        self.plans = InferPlans()

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        """Whoever can answer, lives."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        """Whether every start-up model is warm."""
        return pb.ServerReadyResponse(ready=bool(self._ready()))

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        """Whether the model can answer."""
        entry = self._engine.models.find(_required(request.name, "name"), request.version)
        return pb.ModelReadyResponse(ready=answers(entry))

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        """Name and version of the server."""
        return pb.ServerMetadataResponse(
            name=f"usagi-{self._engine.service}", version=package_version(), extensions=EXTENSIONS
        )

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        """Inputs and outputs of the model."""
        entry = self._engine.models.find(_required(request.name, "name"), request.version)
        versions = [str(other.version) for other in self._engine.models.versions() if other.name == entry.name]
        manifest = entry.manifest
        return pb.ModelMetadataResponse(
            name=entry.name,
            versions=versions,
            platform=platform_of(entry),
            inputs=[_metadata(spec) for spec in manifest.inputs] if manifest else [],
            outputs=[_metadata(spec) for spec in manifest.outputs] if manifest else [],
        )

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        """Runs the model on the tensors of the request."""
        return await self._infer(request, deadline_of(context))

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Answers in the order of the requests; a failed one by `error_message`, and the stream goes on.

        With the metadata `triton_grpc_error: true` the first failure ends the stream with its status, as in Triton.
        """
        deadline = deadline_of(context)
        ends = dict(context.invocation_metadata() or ()).get("triton_grpc_error") == "true"

        async def answer(request: pb.ModelInferRequest) -> pb.ModelStreamInferResponse:
            try:
                response = await self._infer(request, deadline)
            except Exception as error:
                if ends:
                    raise
                return self._stream_error(request, error)
            response.parameters["triton_final_response"].bool_param = True
            return pb.ModelStreamInferResponse(infer_response=response)

        async for response in answer_in_order(requests, answer, STREAM_LIMIT):
            yield response

    def _stream_error(self, request: pb.ModelInferRequest, error: Exception) -> pb.ModelStreamInferResponse:
        status = to_status(error, self._engine.service)
        if status.code == code_pb2.INTERNAL:
            log.error("unexpected error", exc_info=error, extra={"model": request.model_name[:128]})
        response = pb.ModelStreamInferResponse(error_message=status.message)
        response.infer_response.id = request.id
        response.infer_response.parameters["error_code"].string_param = code_pb2.Code.Name(status.code)
        response.infer_response.parameters["triton_final_response"].bool_param = True
        return response

    async def infer_bytes(self, message: bytes, context: Context) -> bytes:
        """ModelInfer from bytes to bytes: without protobuf where a header was seen before (wire.py)."""
        deadline = deadline_of(context)
        seen = self.plans.match(message)
        if seen is None:
            request = parse_message(message, pb.ModelInferRequest.FromString)
            return (await self._infer(request, deadline, message)).SerializeToString()
        plan = seen.plan
        async with self._engine.models.acquire(plan.model_name, plan.model_version, plan.variant) as served:
            with served.batcher.admit():
                if served.manifest is plan.manifest:
                    result = await _run(served, seen.feeds, deadline)
                    return plan.answer(seen.id, served.version, served.variant, result)
                request = pb.ModelInferRequest.FromString(message)  # what does it mean to this version?
                return (await self._infer_admitted(request, served, deadline, message)).SerializeToString()

    async def _infer(
        self, request: pb.ModelInferRequest, deadline: float, message: bytes = b""
    ) -> pb.ModelInferResponse:
        name = _required(request.model_name, "model_name")
        deadline = deadline_within(request, deadline)
        async with self._engine.models.acquire(name, request.model_version, variant_of(request)) as served:
            with served.batcher.admit():
                return await self._infer_admitted(request, served, deadline, message)

    async def _infer_admitted(
        self, request: pb.ModelInferRequest, served: Served, deadline: float, message: bytes
    ) -> pb.ModelInferResponse:
        query = read_query(request, served.manifest)
        if message and isinstance(served, ServedVariant):  # what a pipeline answers differs from item to item
            self.plans.learn(message, request, query, served.manifest)
        return to_response(request, query, served, await _run(served, query.feeds, deadline))

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        """The model's configuration in Triton's words."""
        entry = self._engine.models.find(_required(request.name, "name"), request.version)
        if entry.manifest is None:
            raise ModelUnavailable(f"model {entry.name} version {entry.version} cannot be read: {entry.reason}")
        return pb.ModelConfigResponse(config=model_config(entry, entry.manifest, self._engine.pool.workers))

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Context) -> pb.ModelStatisticsResponse:
        """What the requests took, of one version, of all versions of a model, or of all models."""
        models, telemetry = self._engine.models, self._engine.telemetry
        entries = models.versions()
        if request.name:
            found = models.find(request.name, request.version)
            entries = [found] if request.version else [entry for entry in entries if entry.name == request.name]
        return pb.ModelStatisticsResponse(
            model_stats=[
                model_statistics(entry, telemetry.statistics(entry.name, str(entry.version))) for entry in entries
            ]
        )

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Context) -> pb.RepositoryIndexResponse:
        """Every version with its state, and the cause where it does not answer."""
        _only_repository(request.repository_name)
        entries = self._engine.models.versions()
        return pb.RepositoryIndexResponse(
            models=[index_entry(entry) for entry in entries if answers(entry) or not request.ready]
        )

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        """Looks for new versions, then loads the newest of the model in this process."""
        _only_repository(request.repository_name)
        if request.parameters:
            raise NotSupported("a configuration or files at load are not supported; publish them as a version")
        name = _required(request.model_name, "model_name")
        await self._engine.repository.rescan()
        await self._engine.models.load(name)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        """Stops serving all versions of the model in this process."""
        _only_repository(request.repository_name)
        self._engine.models.unload(_required(request.model_name, "model_name"))
        return pb.RepositoryModelUnloadResponse()


async def _run(served: Served, feeds: dict[str, Array], deadline: float) -> BatchResult:
    try:
        return await served.batcher.submit(feeds, deadline)
    except Exception as error:
        raise graph_failure(error) or error from error


def _refusing(name: str) -> Any:
    async def refuse(self: OpenInferenceServicer, request: Any, context: Context) -> Any:
        raise NotSupported(f"{name} is not supported: this server has no shared memory, trace or log settings")

    return refuse


for _name in UNSUPPORTED:
    setattr(OpenInferenceServicer, _name, _refusing(_name))


def _only_repository(name: str) -> None:
    if name:
        raise NotSupported(f"repository_name is `{name}`, but models are not chosen by repository; leave it empty")


def _required(name: str, field: str) -> str:
    if not name:
        raise InvalidInput(field, "is empty, expected the name of a model")
    return name


def _metadata(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=datatype_of(spec.dtype), shape=spec.shape)
