"""What is measured: the product as it is served, as processes that end with their block.

`native` and `grpcio` are the vision service on either front, `gateway` is Envoy with all filters before the native one.
A peer is another server, started by a script of `peers/`, whose only tie to us is a line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from shared.client.connection import SERVICE_HEADER
from shared.errors import Unreachable
from shared.processes import die_with_parent
from shared.services_table import load_table
from tests.benchmarks.calls import Call, infer_body, infer_call
from tests.benchmarks.models import BenchModel

RAW, NATIVE, GRPCIO, GATEWAY = "raw", "native", "grpcio", "gateway"
START_SECONDS = 120.0
STOP_SECONDS = 15.0


@dataclass(frozen=True)
class Server:
    """A running server: where calls go, which processes count as it, where its metrics are (empty for none)."""

    name: str
    target: str
    processes: tuple[int, ...]
    metrics: str = ""
    ready_seconds: float = 0.0
    paths: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def call(self, model: BenchModel, name: str = "") -> Call:
        """One item of `model`, which may be published under another name."""
        peer = self.paths.get(model.name)
        if not self.paths:
            return infer_call(self.target, name or model.name, model.item())
        if peer is None:
            raise Unreachable(f"{self.name} does not serve {model.name}")
        if peer["body"] == "oip":
            return Call(peer["target"], peer["path"], infer_body(model.name, model.item()))
        return Call(peer["target"], peer["path"], model.item().tobytes(), protocol="http")

    def sums(self) -> dict[tuple[str, str], float]:
        """Sums and counts of /metrics that the breakdown needs: (metric, stage or code) -> value."""
        if not self.metrics:
            return {}
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as reply:
            families = text_string_to_metric_families(reply.read().decode())
        found: dict[tuple[str, str], float] = {}
        for family in families:
            for sample in family.samples:
                if sample.labels.get("method", "").endswith("/ModelInfer") and not sample.name.endswith("_bucket"):
                    key = (sample.name, sample.labels.get("stage") or sample.labels.get("code", ""))
                    found[key] = found.get(key, 0.0) + sample.value
        return found


@contextlib.contextmanager
def service(front: str, roots: list[Path], **variables: object) -> Iterator[Server]:
    """The vision service on `front`; `variables` are of its environment."""
    port, metrics = free_ports(2)
    environment = {
        "USAGI_PORT": port,
        "USAGI_METRICS_PORT": metrics,
        "USAGI_MODEL_ROOTS": ":".join(map(str, roots)),
        "USAGI_FRONT": front,
        "USAGI_LOG_LEVEL": "WARNING",
        **variables,
    }
    began = time.monotonic()
    with _process([sys.executable, "-m", "services.vision.serving"], environment) as started:
        target = f"127.0.0.1:{port}"
        wait_until_serving(target, started)
        yield Server(front, target, (started.pid,), f"127.0.0.1:{metrics}", time.monotonic() - began)


@contextlib.contextmanager
def gateway(upstream: Server) -> Iterator[Server]:
    """Envoy before `upstream`, which stands for every domain."""
    port, admin, catalog, metrics = free_ports(4)
    environment = {
        "USAGI_GATEWAY_PORT": port,
        "USAGI_ADMIN_PORT": admin,
        "USAGI_CATALOG_PORT": catalog,
        "USAGI_METRICS_PORT": metrics,
        **{f"USAGI_UPSTREAM_{name.upper()}": upstream.target for name in load_table().services},
    }
    began = time.monotonic()
    with _process([sys.executable, "-m", "services.gateway"], environment) as started:
        target = f"127.0.0.1:{port}"
        wait_until_serving(target, started)
        processes = (*upstream.processes, started.pid)
        yield Server(GATEWAY, target, processes, upstream.metrics, time.monotonic() - began)


@contextlib.contextmanager
def peer(script: Path, graphs: Path) -> Iterator[Server]:
    """A peer: `script GRAPHS` serves every `<name>.onnx` of the folder and prints one line of JSON when it is ready.

    The line: `{"name": ..., "models": {model: {"target": host:port, "path": ..., "body": "oip" | "raw"}}}`.
    """
    began = time.monotonic()
    with _process([str(script), str(graphs)], {}, read=True) as started:
        assert started.stdout is not None
        line = started.stdout.readline().decode()
        if not line:
            raise Unreachable(f"{script} ended with code {started.wait()}; run it by hand to see why")
        said = json.loads(line)
        yield Server(said["name"], "", (started.pid,), ready_seconds=time.monotonic() - began, paths=said["models"])


@contextlib.contextmanager
def _process(
    command: list[str], environment: Mapping[str, object], *, read: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    variables = {name: str(value) for name, value in environment.items()}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if read else log,
            stderr=log,
            preexec_fn=die_with_parent,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def wait_until_serving(target: str, process: subprocess.Popen[bytes]) -> None:
    """Waits for grpc.health.v1 to say SERVING for vision.

    Raises:
        Unreachable: the process ended, or took too long.
    """
    deadline = time.monotonic() + START_SECONDS
    with grpc.insecure_channel(target, options=[("grpc.max_reconnect_backoff_ms", 100)]) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise Unreachable(f"the server at {target} ended with code {process.returncode}")
            with contextlib.suppress(grpc.RpcError):
                metadata = ((SERVICE_HEADER, "vision"),)
                if check(health_pb2.HealthCheckRequest(), timeout=1, metadata=metadata).status == 1:
                    return
            time.sleep(0.02)
    raise Unreachable(f"{target} is not SERVING after {START_SECONDS:.0f} s")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [opened.getsockname()[1] for opened in sockets]
