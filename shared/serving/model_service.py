"""usagi.model.v1.ModelService over a ModelRepository: the same in every service."""

from __future__ import annotations

from typing import Any

import grpc
from usagi.model.v1 import model_service_pb2 as pb
from usagi.model.v1 import model_service_pb2_grpc as pb_grpc

from shared.artifacts import TensorSpec
from shared.errors import InvalidInput, UsagiError
from shared.serving.engine import Engine
from shared.serving.repository import AUTO, ModelVersion, State
from shared.serving.tensors import datatype_of

DEFAULT_PAGE, MAX_PAGE = 100, 1000
_STATES = {
    State.READY: pb.MODEL_STATE_READY,
    State.AVAILABLE: pb.MODEL_STATE_AVAILABLE,
    State.UNLOADED: pb.MODEL_STATE_UNLOADED,
    State.FAILED: pb.MODEL_STATE_FAILED,
}
Context = grpc.aio.ServicerContext[Any, Any]


class ModelServicer(pb_grpc.ModelServiceServicer):
    """Tells about and controls the models of one service."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """One page of models."""
        page, token = paginate(
            [to_message(entry, self._engine.service) for entry in self._engine.models.versions()], request
        )
        return pb.ListModelsResponse(models=page, next_page_token=token)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """One model with its card."""
        entry = self._engine.models.find(_required(request.name), request.version)
        manifest = entry.manifest
        return pb.GetModelResponse(
            model=to_message(entry, self._engine.service),
            card=entry.card(),
            manifest_json=manifest.to_json() if manifest else "",
        )

    async def LoadModel(self, request: pb.LoadModelRequest, context: Context) -> pb.LoadModelResponse:
        """Loads a model in this process."""
        entry = await self._engine.models.load(_required(request.name), request.version, request.variant or AUTO)
        return pb.LoadModelResponse(model=to_message(entry, self._engine.service), replica=self._engine.config.replica)

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Context) -> pb.UnloadModelResponse:
        """Stops serving a model in this process."""
        self._engine.models.unload(_required(request.name), request.version)
        return pb.UnloadModelResponse(replica=self._engine.config.replica)


def paginate(models: list[pb.Model], request: pb.ListModelsRequest) -> tuple[list[pb.Model], str]:
    """The page that `request` asks for, and the token of the next; the token is the offset.

    Raises:
        InvalidInput: page_size or page_token out of range.
    """
    if not 0 <= request.page_size <= MAX_PAGE:
        raise InvalidInput("page_size", f"is {request.page_size}, expected 1 to {MAX_PAGE}, or 0 for {DEFAULT_PAGE}")
    token = request.page_token or "0"
    if not (token.isascii() and token.isdigit() and len(token) < 10):
        raise InvalidInput("page_token", "is no token of this service; pass the next_page_token of the page before")
    start = int(token)
    stop = start + (request.page_size or DEFAULT_PAGE)
    return models[start:stop], str(stop) if stop < len(models) else ""


def _required(name: str) -> str:
    if not name:
        raise InvalidInput("name", "is empty, expected the name of a model; ListModels lists them")
    return name


def to_message(entry: ModelVersion, service: str) -> pb.Model:
    """A version as the API shows it; a broken one has no more than its name and reason."""
    message = pb.Model(
        name=entry.name,
        version=str(entry.version),
        service=service,
        state=_STATES[entry.state],
        reason=entry.reason,
    )
    manifest = entry.manifest
    if manifest is None:
        return message
    message.task = manifest.task
    message.description = manifest.description
    message.inputs.extend(_tensor(spec) for spec in manifest.inputs)
    message.outputs.extend(_tensor(spec) for spec in manifest.outputs)
    message.labels.extend(manifest.labels)
    try:
        names = manifest.variants_by_preference()
    except UsagiError:
        names = []
    for name in names:
        variant = manifest.variants[name]
        message.variants.add(
            name=name,
            size_bytes=variant.bytes,
            sha256=variant.sha256,
            metrics=dict(variant.metrics),
            max_batch=variant.max_batch,
            within_budget=variant.within_budget,
            loaded=name in entry.loaded,
            providers=entry.loaded[name].providers if name in entry.loaded else (),
        )
    return message


def _tensor(spec: TensorSpec) -> pb.TensorSpec:
    return pb.TensorSpec(name=spec.name, datatype=datatype_of(spec.dtype), shape=spec.shape)
