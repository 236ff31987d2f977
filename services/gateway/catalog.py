"""The catalog: what answers for the whole suite, beside Envoy and off the data path.

Reflection of every domain's services, health of all of them, and one list of all models. Calls reach it when they
name no domain, so a client that knows one address and no proto can find everything.
"""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2
from inference import open_inference_grpc_pb2_grpc as oip_grpc
from usagi.model.v1 import model_service_pb2_grpc as model_grpc

from services.gateway.catalog_interceptor import CatalogInterceptor
from services.gateway.catalog_servicers import CatalogInferenceServicer, MergedModelServicer
from services.gateway.config import GatewayConfig
from services.gateway.descriptors import COMMON_SERVICES, REFLECTION, descriptor_set
from services.gateway.domains import NOT_SERVING, SERVING, Domains
from shared.errors import ConfigurationError
from shared.services_table import ServicesTable
from shared.serving.health import Health
from shared.serving.options import channel_options

OWN_SERVICES = ("usagi.model.v1.ModelService", "inference.GRPCInferenceService")
"""Answered by the catalog itself, so SERVING as long as it lives."""


class Catalog:
    """The catalog's server.

    Args:
        config: where it and Envoy listen.
        table: the services.
        secret: the key with which it asks through Envoy.
    """

    def __init__(self, config: GatewayConfig, table: ServicesTable, secret: str = "") -> None:
        self._config, self._table, self._secret = config, table, secret
        self._limit = table.gateway.max_message_bytes
        self._health = Health()
        self._domains: Domains | None = None
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Listens on loopback, and follows the services' health.

        Raises:
            ConfigurationError: the port is taken.
        """
        self._domains = Domains(list(self._table.services), self._config.reachable_at, self._limit, self._secret)
        server = self._server = grpc.aio.server(
            interceptors=[CatalogInterceptor(self._domains.names)],
            options=channel_options(self._limit, connections_age=False),
        )
        model_grpc.add_ModelServiceServicer_to_server(MergedModelServicer(self._domains), server)
        inference: Any = CatalogInferenceServicer  # some of its methods are set by name, which mypy cannot see
        oip_grpc.add_GRPCInferenceServiceServicer_to_server(inference(self._domains), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        server.add_generic_rpc_handlers(reflection_handlers(self._table))
        try:
            server.add_insecure_port(f"127.0.0.1:{self._config.catalog_port}")
        except RuntimeError as error:
            address = f"127.0.0.1:{self._config.catalog_port}"
            raise ConfigurationError(
                f"cannot listen on {address}: is another gateway there? set USAGI_CATALOG_PORT"
            ) from error
        await self._health.set("", NOT_SERVING)
        for name in OWN_SERVICES:
            await self._health.set(name, SERVING)
        await server.start()
        self._domains.watch(self._publish)

    async def _publish(self, domain: str, serving: bool) -> None:
        """Says the health of a domain's typed services, and of the whole: SERVING when every domain is."""
        assert self._domains is not None
        for name in self._table.services[domain].grpc_services:
            await self._health.set(name, SERVING if serving else NOT_SERVING)
        await self._health.set("", SERVING if all(self._domains.serving.values()) else NOT_SERVING)

    async def drain(self) -> None:
        """Says NOT_SERVING for everything, and stops asking, so that its own calls do not count as running."""
        await self._health.enter_graceful_shutdown()
        if self._domains is not None:
            await self._domains.close()

    async def stop(self) -> None:
        """Ends the server and its connections."""
        await self.drain()
        if self._server is not None:
            await self._server.stop(1.0)


def reflection_handlers(table: ServicesTable) -> list[grpc.GenericRpcHandler]:
    """Reflection under both of its names, from the descriptor set: no stub of any domain is imported."""
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_set().file:
        pool.Add(file)
    typed_services = [name for service in table.services.values() for name in service.grpc_services]
    servicer = reflection.aio.ReflectionServicer([*typed_services, *COMMON_SERVICES, *REFLECTION[:1]], pool=pool)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return [grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler}) for name in REFLECTION]
