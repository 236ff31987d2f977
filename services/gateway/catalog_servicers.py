"""What the catalog answers: all services' models, and the Open Inference Protocol's questions about the server."""

from __future__ import annotations

import base64
import binascii
import importlib.metadata
from collections.abc import AsyncIterator
from typing import Any

from inference import open_inference_grpc_pb2 as oip
from inference import open_inference_grpc_pb2_grpc as oip_grpc
from usagi.model.v1 import model_service_pb2 as pb
from usagi.model.v1 import model_service_pb2_grpc as pb_grpc

from services.gateway.domains import Domains
from services.gateway.routes import SERVICE_HEADER
from shared.errors import InvalidInput, ModelNotFound, Unreachable
from shared.serving.calls import REQUEST_ID
from shared.serving.guarded import request_id_of

DEFAULT_PAGE = 100
MAX_PAGE = 1000
UNREACHABLE = "usagi-unreachable"
"""Trailer that names the domains which a list leaves out, since they did not answer."""


class MergedModelServicer(pb_grpc.ModelServiceServicer):
    """ModelService over all domains; loading needs a domain."""

    def __init__(self, domains: Domains) -> None:
        self._domains = domains

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        """One page of all models; domains that do not answer are left out and named in a trailer."""
        if not 0 <= request.page_size <= MAX_PAGE:
            raise InvalidInput("page_size", f"is {request.page_size}, expected 0 to {MAX_PAGE}")
        after = _parse_token(request.page_token)
        models, unreachable = await self._domains.list_models(_metadata(context))
        if unreachable:
            context.set_trailing_metadata(((UNREACHABLE, ",".join(unreachable)),))
        rest = sorted((model for model in models if _key(model) > after), key=_key)
        page = rest[: request.page_size or DEFAULT_PAGE]
        token = _token(page[-1]) if len(page) < len(rest) else ""
        return pb.ListModelsResponse(models=page, next_page_token=token)

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        """The model, from whichever domain has one of that name."""
        if not request.name:
            raise InvalidInput("name", "is empty, expected the name of a model; ListModels lists them")
        models, unreachable = await self._domains.list_models(_metadata(context))
        holders = sorted({model.service for model in models if model.name == request.name})
        if len(holders) > 1:
            raise InvalidInput("name", f"{', '.join(holders)} each have a model of this name; {_say_which(holders)}")
        if holders:
            return await self._domains.get_model(holders[0], request, _metadata(context))
        if unreachable:
            raise Unreachable(f"model `{request.name}` is not in the domains that answer; {unreachable} do not")
        raise ModelNotFound("name", request.name, sorted({model.name for model in models}))

    async def LoadModel(self, request: pb.LoadModelRequest, context: Any) -> pb.LoadModelResponse:
        """Refuses: loading concerns one domain."""
        raise _needs_domain(self._domains)

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Any) -> pb.UnloadModelResponse:
        """Refuses: unloading concerns one domain."""
        raise _needs_domain(self._domains)


class CatalogInferenceServicer(oip_grpc.GRPCInferenceServiceServicer):
    """The Open Inference Protocol without a domain: answers for the server, refuses for models."""

    def __init__(self, domains: Domains) -> None:
        self._domains = domains

    async def ServerLive(self, request: oip.ServerLiveRequest, context: Any) -> oip.ServerLiveResponse:
        """True: somebody answers."""
        return oip.ServerLiveResponse(live=True)

    async def ServerReady(self, request: oip.ServerReadyRequest, context: Any) -> oip.ServerReadyResponse:
        """True if every domain serves."""
        return oip.ServerReadyResponse(ready=all(self._domains.serving.values()))

    async def ServerMetadata(self, request: oip.ServerMetadataRequest, context: Any) -> oip.ServerMetadataResponse:
        """Name and version of the suite."""
        return oip.ServerMetadataResponse(name="usagi", version=_package_version())

    async def RepositoryIndex(self, request: oip.RepositoryIndexRequest, context: Any) -> oip.RepositoryIndexResponse:
        """The index of all domains; those that do not answer are left out and named in a trailer."""
        models, unreachable = await self._domains.repository_index(request, _metadata(context))
        if unreachable:
            context.set_trailing_metadata(((UNREACHABLE, ",".join(unreachable)),))
        return oip.RepositoryIndexResponse(models=models)

    async def ModelStreamInfer(self, requests: Any, context: Any) -> AsyncIterator[oip.ModelStreamInferResponse]:
        """Refuses: the domain is missing."""
        raise _needs_domain(self._domains)
        yield oip.ModelStreamInferResponse()  # never reached: it makes this the stream that gRPC expects

    async def ModelReady(self, request: oip.ModelReadyRequest, context: Any) -> oip.ModelReadyResponse:
        """Refuses: the domain is missing."""
        raise _needs_domain(self._domains)

    async def ModelMetadata(self, request: oip.ModelMetadataRequest, context: Any) -> oip.ModelMetadataResponse:
        """Refuses: the domain is missing."""
        raise _needs_domain(self._domains)

    async def ModelInfer(self, request: oip.ModelInferRequest, context: Any) -> oip.ModelInferResponse:
        """Refuses: the domain is missing."""
        raise _needs_domain(self._domains)


def _refusing(name: str) -> Any:
    async def refuse(self: CatalogInferenceServicer, request: Any, context: Any) -> Any:
        raise _needs_domain(self._domains)

    return refuse


for _method in oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
    if _method.name not in vars(CatalogInferenceServicer):
        setattr(CatalogInferenceServicer, _method.name, _refusing(_method.name))


def _package_version() -> str:
    """Version of Usagi; `0` when it runs from a bare checkout."""
    try:
        return importlib.metadata.version("usagi")
    except importlib.metadata.PackageNotFoundError:
        return "0"


def _needs_domain(domains: Domains) -> InvalidInput:
    return InvalidInput(
        SERVICE_HEADER,
        f"is not set, and this method needs a domain; {_say_which(domains.names)}",
        reason="DOMAIN_MISSING",
    )


def _say_which(names: Any) -> str:
    return f"set the header `{SERVICE_HEADER}` to one of: {', '.join(names)}"


def _metadata(context: Any) -> tuple[tuple[str, str], ...]:
    found = request_id_of(context)
    return ((REQUEST_ID, found),) if found else ()


Key = tuple[str, str, int]


def _key(model: pb.Model) -> Key:
    return model.service, model.name, int(model.version)


def _token(model: pb.Model) -> str:
    return base64.urlsafe_b64encode("\n".join(map(str, _key(model))).encode()).decode()


def _parse_token(token: str) -> Key:
    """The key after which the page begins; a token stays valid while models come and go."""
    if not token:
        return ("", "", 0)
    try:
        service, name, version = base64.urlsafe_b64decode(token).decode().split("\n")
        return service, name, int(version)
    except (ValueError, binascii.Error) as error:
        raise InvalidInput("page_token", "is not a token of ListModels; take the next_page_token as it is") from error
