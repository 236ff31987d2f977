"""grpc.health.v1 as gRPC ships it for asyncio, with what it lacks: List, and an end of the Watch streams."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio


class Health(health_aio.HealthServicer):  # type: ignore[misc]
    """grpc.health.v1, whose Watch streams can be ended: gRPC's own would hold a stopping server for its whole grace."""

    def __init__(self) -> None:
        super().__init__()
        self._watches: set[asyncio.Task[Any]] = set()

    async def List(self, request: Any, context: Any) -> Any:
        """The status of every name."""
        statuses = {name: health_pb2.HealthCheckResponse(status=status) for name, status in self._server_status.items()}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(self, request: Any, context: Any) -> None:
        """Tells every change of a service's status until the caller leaves or the server stops."""
        watch = asyncio.ensure_future(super().Watch(request, context))
        self._watches.add(watch)
        try:
            await asyncio.wait({watch})
        finally:
            self._watches.discard(watch)
            watch.cancel()

    def end_watches(self) -> None:
        """Ends all Watch streams with OK; their callers have seen NOT_SERVING."""
        for watch in self._watches:
            watch.cancel()
