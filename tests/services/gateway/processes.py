"""A real gateway, Envoy included, and a stub of the vision service, as processes that end with their block."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

STUB = Path(__file__).with_name("stub_vision.py")
ROOT = Path(__file__).parents[3]
START_SECONDS = 20


def free_ports(count):
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [opened.getsockname()[1] for opened in sockets]


@contextlib.contextmanager
def process(*arguments, **environment):
    """A Python process that ends with the block; SIGKILL if SIGTERM does not do."""
    output = tempfile.TemporaryFile()  # noqa: SIM115  a pipe that nobody reads fills up, and then Envoy stands still
    started = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **{key: str(value) for key, value in environment.items()}},
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    started.output = output
    try:
        yield started
    finally:
        if started.poll() is None:
            started.send_signal(signal.SIGTERM)
        try:
            started.wait(timeout=10)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
        output.close()


def other_address():
    """An address of this machine that is not loopback, or None; connecting a datagram socket sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        address = probe.getsockname()[0]
    return None if address.startswith("127.") else address


def stub(port):
    return process(STUB, port)


def wait_for_health(target, status, service="", within=START_SECONDS):
    """Seconds until the gateway says `status`."""
    started = time.monotonic()
    with grpc.insecure_channel(target, options=[("grpc.max_reconnect_backoff_ms", 200)]) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        while time.monotonic() < started + within:
            with contextlib.suppress(grpc.RpcError):
                if check(health_pb2.HealthCheckRequest(service=service), timeout=1).status == status:
                    return time.monotonic() - started
            time.sleep(0.02)
    raise AssertionError(f"{target} does not say {status} within {within} s")


@dataclass
class Gateway:
    port: int
    admin_port: int
    upstream_port: int
    metrics_port: int
    process: subprocess.Popen

    @property
    def target(self):
        return f"127.0.0.1:{self.port}"


@contextlib.contextmanager
def running_gateway(**environment):
    port, admin, catalog, metrics, upstream = free_ports(5)
    with process(
        "-m",
        "services.gateway",
        USAGI_GATEWAY_HOST="0.0.0.0",
        USAGI_GATEWAY_PORT=port,
        USAGI_ADMIN_PORT=admin,
        USAGI_CATALOG_PORT=catalog,
        USAGI_METRICS_PORT=metrics,
        USAGI_SERVICES="vision",
        **{"USAGI_UPSTREAM_VISION": f"127.0.0.1:{upstream}", **environment},
    ) as started:
        yield Gateway(port, admin, upstream, metrics, started)
