"""What stands between the network and the handlers: gRPC's own asyncio server, or a native one with the same contract.

`USAGI_FRONT` chooses. ADR 7 has the evidence for the default and says what does not run natively.
"""

from __future__ import annotations

from typing import Protocol

import grpc
import grpc.aio

from shared.serving.handlers import CallHandlers
from shared.serving.options import channel_options

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

    def __init__(self, handlers: CallHandlers, max_message_bytes: int, *, connections_age: bool = True) -> None:
        self._server = grpc.aio.server(options=channel_options(max_message_bytes, connections_age=connections_age))
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
