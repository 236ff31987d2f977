"""What stands between the network and the handlers: gRPC's own asyncio server, or a native one with the same contract.

`USAGI_FRONT` chooses. ADR 7 has the evidence for the default and says what does not run natively.
"""

from __future__ import annotations

from typing import Any, Protocol

import grpc
import grpc.aio

from shared.serving.handlers import CallHandlers

FRONTS = ("native", "grpcio")


class Front(Protocol):
    """A gRPC server: `listen`, `start`, serve, `stop`."""

    def listen(self, address: str) -> int:
        """Binds `host:port` without taking calls yet; returns the port.

        Raises:
            OSError, RuntimeError: the port is taken.
        """

    async def start(self) -> None:
        """Takes calls from now on."""

    async def stop(self, grace: float) -> None:
        """Refuses new calls, lets running ones finish for `grace` seconds, then cancels them."""


def make_front(name: str, handlers: CallHandlers, max_message_bytes: int) -> Front:
    """The front of that name, one of FRONTS."""
    if name == "native":
        from shared.serving.native_front import NativeFront  # its wheel is loaded only where it serves

        return NativeFront(handlers, max_message_bytes)
    return GrpcioFront(handlers, max_message_bytes)


class GrpcioFront:
    """grpc.aio."""

    def __init__(self, handlers: CallHandlers, max_message_bytes: int) -> None:
        self._server = grpc.aio.server(options=channel_options(max_message_bytes))
        self._server.add_generic_rpc_handlers((handlers,))

    def listen(self, address: str) -> int:
        """See Front."""
        return self._server.add_insecure_port(address)

    async def start(self) -> None:
        """See Front."""
        await self._server.start()

    async def stop(self, grace: float) -> None:
        """See Front."""
        await self._server.stop(grace)


def channel_options(max_message_bytes: int) -> list[tuple[str, Any]]:
    """gRPC's options of every grpcio server of ours."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.so_reuseport", 0),  # two servers on one port would share it silently
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.max_connection_age_ms", 5 * 60_000),  # so that new replicas get their share
        ("grpc.max_connection_age_grace_ms", 60_000),
    ]
