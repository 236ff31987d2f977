"""The real gateway before the server under attack."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from grpc_health.v1 import health_pb2

from tests.fuzz.server import FuzzedServer
from tests.services.gateway.processes import running_gateway, wait_for_health


@contextlib.contextmanager
def gateway_before(server: FuzzedServer) -> Iterator[str]:
    """Runs Envoy and the catalog until the block ends; gives the gateway's `host:port`."""
    with running_gateway(USAGI_UPSTREAM_VISION=server.address) as gateway:
        wait_for_health(gateway.target, health_pb2.HealthCheckResponse.SERVING)
        yield gateway.target
