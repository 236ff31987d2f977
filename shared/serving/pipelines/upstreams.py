"""The other servers that a pipeline's steps may ask: any that speaks the Open Inference Protocol.

A pipeline's file names an upstream, not an address, so that the same file serves on one machine and in containers.
Every domain of services.toml is known by its name; `USAGI_UPSTREAM_<NAME>=host:port` moves one or adds another.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from typing import Any

import grpc
import grpc.aio
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc

from shared.artifacts import ArtifactError, TensorSpec
from shared.client.connection import SERVICE_HEADER, CallFailed, to_call_failed, trace_metadata
from shared.errors import (
    ConfigurationError,
    DeadlinePassed,
    InvalidInput,
    ModelUnavailable,
    Overloaded,
    Unreachable,
    UsagiError,
)
from shared.services_table import load_table
from shared.serving.calls import PIPELINES_HEADER, REQUEST_ID, TRACE_PARENT, TRACE_STATE, current_call
from shared.serving.pipelines.checking import StepModel
from shared.serving.pipelines.definition import StepDefinition
from shared.serving.tensors import dtype_name_of

OVERRIDE = "USAGI_UPSTREAM_"
PROBE_SECONDS = 1.0
Stub = Any
Headers = tuple[tuple[str, str], ...]


def upstream_addresses(where: str, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """`host:port` of every upstream.

    Args:
        where: `local` (every domain on this machine) or `network` (by its name).
        environ: the environment.

    Raises:
        ConfigurationError: a variable that is no address.
    """
    environ = os.environ if environ is None else environ
    addresses = {
        name: f"{name}:{service.port}" if where == "network" else f"127.0.0.1:{service.local_port}"
        for name, service in load_table().services.items()
    }
    for variable in sorted(key for key in environ if key.startswith(OVERRIDE)):
        host, _, port = environ[variable].rpartition(":")
        if not (host and port.isdigit() and 0 < int(port) <= 65535):
            raise ConfigurationError(f"{variable}={environ[variable]!r} is not host:port")
        addresses[variable.removeprefix(OVERRIDE).lower()] = environ[variable]
    return addresses


class Upstreams:
    """One channel to each upstream, made when it is first needed.

    Args:
        addresses: by name; see `upstream_addresses`.
        max_message_bytes: limit of a message.
    """

    def __init__(self, addresses: Mapping[str, str], max_message_bytes: int) -> None:
        self._addresses = addresses
        self._limit = max_message_bytes
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._stubs: dict[str, Stub] = {}

    def stub(self, name: str) -> Stub:
        """The protocol's stub for an upstream.

        Raises:
            ArtifactError: it is not known.
        """
        if name not in self._stubs:
            if name not in self._addresses:
                raise ArtifactError(
                    f"upstream `{name}` is not known, expected one of {', '.join(self._addresses)}; "
                    f"set {OVERRIDE}{name.upper()}=host:port"
                )
            channel = grpc.aio.insecure_channel(self._addresses[name], options=_options(self._limit))
            self._channels[name] = channel
            self._stubs[name] = pb_grpc.GRPCInferenceServiceStub(channel)
        return self._stubs[name]

    async def describe(self, step: StepDefinition) -> StepModel:
        """What the model of a step takes and gives.

        Raises:
            ArtifactError: the upstream is not known.
            UsagiError: it does not answer, or its model is not ready.
        """
        stub = self.stub(step.upstream)
        headers = ((SERVICE_HEADER, step.upstream),)
        try:
            ready = stub.ModelReady(
                pb.ModelReadyRequest(name=step.model, version=step.version), metadata=headers, timeout=PROBE_SECONDS
            )
            metadata = stub.ModelMetadata(
                pb.ModelMetadataRequest(name=step.model, version=step.version), metadata=headers, timeout=PROBE_SECONDS
            )
            told = await asyncio.gather(ready, metadata)
        except grpc.aio.AioRpcError as error:
            raise self.failure(error, step) from error
        if not told[0].ready:
            raise ModelUnavailable(f"model {step.model} of upstream {step.upstream} is not ready")
        return StepModel(tuple(map(_spec, told[1].inputs)), tuple(map(_spec, told[1].outputs)))

    def failure(self, error: grpc.aio.AioRpcError, step: StepDefinition) -> UsagiError:
        """What an upstream's refusal means to the pipeline's caller.

        Values that the model refuses are the caller's, overload and deadlines pass on as they are. What the pipeline's
        file or the upstream gets wrong is no fault of the caller.
        """
        failed = to_call_failed(error, self._addresses.get(step.upstream, ""))
        text = f"upstream {step.upstream}: {_short(failed)}"
        if failed.code == "DEADLINE_EXCEEDED":
            return DeadlinePassed(text)
        if failed.code == "RESOURCE_EXHAUSTED":
            return Overloaded(text, retry_after=failed.retry_after or 1.0)
        if failed.code in ("INVALID_ARGUMENT", "OUT_OF_RANGE"):
            return InvalidInput("inputs", text)
        if failed.code in ("NOT_FOUND", "FAILED_PRECONDITION", "UNIMPLEMENTED", "PERMISSION_DENIED", "UNAUTHENTICATED"):
            return ModelUnavailable(text)
        return Unreachable(text)

    async def close(self) -> None:
        """Ends the channels."""
        channels, self._channels, self._stubs = list(self._channels.values()), {}, {}
        for channel in channels:
            await channel.close()


def call_headers(step: StepDefinition, path: tuple[str, ...]) -> Headers:
    """What travels with a step's call: its domain, the request id, the trace, the pipelines that it came through."""
    headers = [(SERVICE_HEADER, step.upstream), (PIPELINES_HEADER, ",".join(path))]
    call = current_call.get()
    if call is None:
        return tuple(headers)
    headers.append((REQUEST_ID, call.request_id))
    trace = trace_metadata() if call.span is not None else ()
    came = tuple((name, call.headers[name]) for name in (TRACE_PARENT, TRACE_STATE) if name in call.headers)
    return (*headers, *(trace or came))


def _options(limit: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", limit),
        ("grpc.max_reconnect_backoff_ms", 1000),  # or a restarted upstream stays away for up to two minutes
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.dns_min_time_between_resolutions_ms", 1000),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),  # replicas share
    ]


def _spec(tensor: Any) -> TensorSpec:
    return TensorSpec(tensor.name, dtype_name_of(tensor.datatype), tuple(tensor.shape))


def _short(failed: CallFailed) -> str:
    if failed.code == "UNAVAILABLE" and failed.reason == "UNAVAILABLE":  # gRPC's own words, which name sockets
        return "does not answer"
    return f"{failed.code}: {failed.message[:300]}"
