"""One gateway with a stub behind it for the whole session; tests leave both as they are."""

import grpc
import pytest
from grpc_health.v1 import health_pb2

from tests.services.gateway.processes import running_gateway, stub, wait_for_health


@pytest.fixture(scope="session")
def gateway():
    with running_gateway() as running, stub(running.upstream_port):
        wait_for_health(running.target, health_pb2.HealthCheckResponse.SERVING)
        yield running


@pytest.fixture(scope="session")
def channel(gateway):
    limit = 64 * 1024 * 1024  # over the gateway's, so that it is the one that refuses
    options = [("grpc.max_send_message_length", limit), ("grpc.max_receive_message_length", limit)]
    with grpc.insecure_channel(gateway.target, options=options) as opened:
        yield opened
