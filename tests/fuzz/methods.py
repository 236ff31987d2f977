"""Every RPC of a running server, as its reflection tells: a new one is attacked without anybody doing anything."""

from __future__ import annotations

from dataclasses import dataclass

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


@dataclass(frozen=True)
class Method:
    """One RPC: `path` is `/package.Service/Method`, `request` and `response` the classes of its messages."""

    path: str
    request: type[Message]
    response: type[Message]
    client_streaming: bool
    server_streaming: bool

    @property
    def service(self) -> str:
        """Full name of the service."""
        return self.path.split("/")[1]


def enumerate_methods(target: str) -> list[Method]:
    """All methods of all services that the server at `target` offers, by path."""
    with grpc.insecure_channel(target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = descriptor_pool.DescriptorPool(database)
        found = [
            Method(
                f"/{service}/{method.name}",
                message_factory.GetMessageClass(method.input_type),
                message_factory.GetMessageClass(method.output_type),
                method.client_streaming,
                method.server_streaming,
            )
            for service in database.get_services()
            for method in pool.FindServiceByName(service).methods
        ]
        return sorted(found, key=lambda method: method.path)
