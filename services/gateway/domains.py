"""What the catalog knows of the services: their health as it changes, and their models on demand.

It asks through the gateway, like any caller. So SERVING means that a call by the gateway arrives, and not only that the
service is up, of which Envoy learns at its next health check.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from inference import open_inference_grpc_pb2 as oip
from inference import open_inference_grpc_pb2_grpc as oip_grpc
from usagi.model.v1 import model_service_pb2 as pb
from usagi.model.v1 import model_service_pb2_grpc as pb_grpc

from services.gateway.config import Address
from services.gateway.routes import SERVICE_HEADER

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
WATCH_SECONDS = 10.0
CALL_SECONDS = 2.0
PAGE_SIZE = 1000

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

HealthListener = Callable[[str, bool], Awaitable[None]]
"""Is told a domain and whether it serves, at the start and at each change."""


class Domains:
    """All domains, behind one channel to the gateway.

    Args:
        names: the domains.
        gateway: where Envoy listens.
        max_message_bytes: limit of one message.
        secret: the catalog's own key. It has the role infer, so that nobody can use the catalog as a way round.
    """

    def __init__(self, names: Sequence[str], gateway: Address, max_message_bytes: int, secret: str = "") -> None:
        options = [
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.enable_http_proxy", 0),
        ]
        self.names = tuple(names)
        self.serving = dict.fromkeys(names, False)
        self._channel = grpc.aio.insecure_channel(str(gateway), options=options)
        self._key = (("authorization", f"Bearer {secret}"),) if secret else ()
        self._watchers: list[asyncio.Task[None]] = []

    def watch(self, listener: HealthListener) -> None:
        """Follows the health of every domain from now on."""
        self._watchers = [asyncio.create_task(self._follow(name, listener)) for name in self.names]

    async def _follow(self, name: str, listener: HealthListener) -> None:
        stub = health_pb2_grpc.HealthStub(self._channel)
        while True:
            answered = False
            try:
                request = health_pb2.HealthCheckRequest()
                async for answer in stub.Watch(request, timeout=WATCH_SECONDS, metadata=self._to(name)):
                    answered = answer.status == SERVING
                    await self._say(name, answered, listener)
                    if not answered:
                        break  # another replica may be well: ask again
            except grpc.aio.AioRpcError as error:
                if answered and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    continue  # all is well; a new stream finds out whether the replica still answers
            await self._say(name, False, listener)
            await asyncio.sleep(RETRY_SECONDS)

    async def _say(self, name: str, serving: bool, listener: HealthListener) -> None:
        if serving != self.serving[name]:
            log.info("health", extra={"domain": name, "serving": serving})
        self.serving[name] = serving
        await listener(name, serving)

    async def list_models(self, metadata: Any) -> tuple[list[pb.Model], list[str]]:
        """The models of all domains, and the domains that did not answer."""
        answers = await asyncio.gather(*(self._models_of(name, metadata) for name in self.names))
        models = [model for answer in answers if answer is not None for model in answer]
        unreachable = [name for name, answer in zip(self.names, answers, strict=True) if answer is None]
        return models, unreachable

    async def _models_of(self, name: str, metadata: Any) -> list[pb.Model] | None:
        stub = pb_grpc.ModelServiceStub(self._channel)
        models: list[pb.Model] = []
        request = pb.ListModelsRequest(page_size=PAGE_SIZE)
        try:
            while True:
                page = await stub.ListModels(request, timeout=CALL_SECONDS, metadata=self._to(name, *metadata))
                models.extend(page.models)
                if not page.next_page_token:
                    return models
                request.page_token = page.next_page_token
        except grpc.aio.AioRpcError as error:
            log.warning("no list of models", extra={"domain": name, "code": error.code().name})
            return None

    async def repository_index(
        self, request: oip.RepositoryIndexRequest, metadata: Any
    ) -> tuple[list[oip.RepositoryIndexResponse.ModelIndex], list[str]]:
        """The indexes of all domains, one after the other, and the domains that did not answer."""
        answers = await asyncio.gather(*(self._index_of(name, request, metadata) for name in self.names))
        models = [model for answer in answers if answer is not None for model in answer]
        return models, [name for name, answer in zip(self.names, answers, strict=True) if answer is None]

    async def _index_of(
        self, name: str, request: oip.RepositoryIndexRequest, metadata: Any
    ) -> list[oip.RepositoryIndexResponse.ModelIndex] | None:
        stub = oip_grpc.GRPCInferenceServiceStub(self._channel)
        try:
            answer = await stub.RepositoryIndex(request, timeout=CALL_SECONDS, metadata=self._to(name, *metadata))
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                log.warning("no repository index", extra={"domain": name, "code": error.code().name})
                return None
            raise
        return list(answer.models)

    async def get_model(self, name: str, request: pb.GetModelRequest, metadata: Any) -> pb.GetModelResponse:
        """Asks one domain for a model; its error passes on as it is."""
        stub = pb_grpc.ModelServiceStub(self._channel)
        return await stub.GetModel(request, timeout=CALL_SECONDS, metadata=self._to(name, *metadata))

    def _to(self, name: str, *metadata: tuple[str, str]) -> tuple[tuple[str, str], ...]:
        return ((SERVICE_HEADER, name), *self._key, *metadata)

    async def close(self) -> None:
        """Ends the watching and closes the channel."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await self._channel.close()
