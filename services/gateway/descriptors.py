"""Descriptor set of everything the gateway speaks: `shared/gen/usagi.binpb`, and the protos that gRPC itself brings.

Envoy transcodes with it, and needs google.rpc's error details in it to write a rich status as JSON. It travels inside
the rendered configuration, so that one file is all that Envoy reads.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from google.protobuf import any_pb2, descriptor_pb2, duration_pb2
from google.protobuf.descriptor import FileDescriptor
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

DESCRIPTOR_SET = Path(__file__).resolve().parents[2] / "shared" / "gen" / "usagi.binpb"

COMMON_SERVICES = ("grpc.health.v1.Health", "inference.GRPCInferenceService", "usagi.model.v1.ModelService")
"""Services that every container offers at the same path."""
REFLECTION = ("grpc.reflection.v1alpha.ServerReflection", "grpc.reflection.v1.ServerReflection")
"""The two names of server reflection; their messages are the same on the wire."""

_BROUGHT_ALONG = (
    any_pb2.DESCRIPTOR,
    duration_pb2.DESCRIPTOR,
    status_pb2.DESCRIPTOR,
    error_details_pb2.DESCRIPTOR,
    health_pb2.DESCRIPTOR,
    reflection_pb2.DESCRIPTOR,
)


@cache
def descriptor_set() -> descriptor_pb2.FileDescriptorSet:
    """All files, each after those that it imports."""
    files = descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTOR_SET.read_bytes())
    known = {file.name for file in files.file}
    for descriptor in _BROUGHT_ALONG:
        if descriptor.name not in known:
            files.file.append(_proto_of(descriptor))
    return files


def _proto_of(descriptor: FileDescriptor) -> descriptor_pb2.FileDescriptorProto:
    proto = descriptor_pb2.FileDescriptorProto()
    descriptor.CopyToProto(proto)
    return proto


@cache
def safe_unary_methods(services: tuple[str, ...]) -> tuple[str, ...]:
    """Paths of the methods of `services` that take one message, give one and are marked NO_SIDE_EFFECTS."""
    return tuple(
        f"/{file.package}.{service.name}/{method.name}"
        for file in descriptor_set().file
        for service in file.service
        if f"{file.package}.{service.name}" in services
        for method in service.method
        if method.options.idempotency_level == descriptor_pb2.MethodOptions.NO_SIDE_EFFECTS
        and not (method.client_streaming or method.server_streaming)
    )


@cache
def client_streaming_methods() -> tuple[str, ...]:
    """Paths of the methods that take a stream of requests, such as `/usagi.vision.v1.VisionService/ClassifyImages`."""
    return tuple(
        f"/{file.package}.{service.name}/{method.name}"
        for file in descriptor_set().file
        for service in file.service
        for method in service.method
        if method.client_streaming
    )
