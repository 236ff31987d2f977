"""The compose stack under test: a project of its own on a free port, with what the tests ask of Docker."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from usagi.vision.v1 import vision_service_pb2 as pb
from usagi.vision.v1 import vision_service_pb2_grpc as pb_grpc

ROOT = Path(__file__).parents[2]
PHOTOS = sorted((ROOT / "tests/data/flowers").glob("*.jpg"))
ALL_PROFILES = ("--profile", "load", "--profile", "train", "--profile", "observability")


@dataclass(frozen=True)
class Refused:
    """How a call failed: gRPC code and ErrorInfo reason (empty without details)."""

    code: grpc.StatusCode
    reason: str
    message: str


class ComposeStack:
    """`make up` and what belongs to it, apart from whatever else runs on this machine."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.project = f"usagi-e2e-{self.port}"
        self.target = f"127.0.0.1:{self.port}"
        self.environment = {
            **os.environ,
            "COMPOSE_PROJECT_NAME": self.project,
            "USAGI_GATEWAY_PORT": str(self.port),
            "USAGI_LOAD_SECONDS": "8",
        }

    def run(self, *command: str, check: bool = True, stdin: str | None = None) -> str:
        """A command in the repository's root; what it prints, and that with its errors if it fails."""
        result = subprocess.run(
            command, cwd=ROOT, env=self.environment, input=stdin, capture_output=True, text=True, check=False
        )
        if check and result.returncode:
            raise AssertionError(
                f"{' '.join(command)} ended with {result.returncode}:\n{result.stdout[-4000:]}{result.stderr[-4000:]}"
            )
        return result.stdout

    def compose(self, *arguments: str, check: bool = True, stdin: str | None = None) -> str:
        """`docker compose ...` on this stack."""
        return self.run("docker", "compose", *ALL_PROFILES, *arguments, check=check, stdin=stdin)

    def remove(self) -> None:
        """Containers, networks, volumes and the images that were built for this project."""
        self.compose("down", "--volumes", "--remove-orphans", "--rmi", "local", "--timeout", "5", check=False)

    def containers(self, service: str) -> list[str]:
        """Ids of a service's running containers, oldest first."""
        ids = self.compose("ps", "--quiet", service).split()
        return sorted(ids, key=lambda each: self.inspect(each)["Created"])

    def inspect(self, container: str) -> dict[str, Any]:
        """What Docker knows about a container."""
        return json.loads(self.run("docker", "inspect", container))[0]

    def image_size(self, image: str) -> int:
        """Bytes of an image."""
        return int(self.run("docker", "image", "inspect", "--format", "{{.Size}}", image))

    def python(self, container: str, program: str) -> Any:
        """Runs a Python program in a container; what it prints is JSON."""
        return json.loads(self.run("docker", "exec", "-i", container, "python", "-", stdin=program))

    def memory_bytes(self) -> dict[str, int]:
        """Memory of every running container as `docker stats` shows it."""
        ids = self.compose("ps", "--quiet").split()
        lines = self.run("docker", "stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}}", *ids).splitlines()
        return {name: _bytes(used) for name, used, *_ in (line.split() for line in lines)}

    def wait_until_serving(self, seconds: float, service: str = "") -> float:
        """Waits until the gateway says SERVING; the seconds that it took."""
        started = time.monotonic()
        with grpc.insecure_channel(self.target, options=NO_RETRIES) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while time.monotonic() < started + seconds:
                with contextlib.suppress(grpc.RpcError):
                    answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=1)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return time.monotonic() - started
                time.sleep(0.05)
        raise AssertionError(f"not SERVING after {seconds} s:\n{self.compose('logs', '--tail', '30')}")


NO_RETRIES = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
"""So that a test sees what the gateway answers, not what the client makes of it."""


class Caller:
    """A client without retries that classifies photos and tells how each call went.

    Args:
        target: the gateway.
        key: an API key.
        ca: the authority of the gateway's certificate as PEM; None for no TLS.
    """

    def __init__(self, target: str, key: str = "", ca: bytes | None = None) -> None:
        self.metadata = [("authorization", f"Bearer {key}")] if key else []
        if ca is None:
            self.channel = grpc.insecure_channel(target, options=NO_RETRIES)
        else:
            self.channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(ca), options=NO_RETRIES)
        self.stub = pb_grpc.VisionServiceStub(self.channel)
        self.photos = [path.read_bytes() for path in PHOTOS]

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def call(self, number: int = 0, timeout: float = 20.0) -> Refused | None:
        """Classifies the photo of that number (modulo their count); None if it was answered."""
        request = pb.ClassifyImageRequest(image=self.photos[number % len(self.photos)])
        try:
            assert self.stub.ClassifyImage(request, timeout=timeout, metadata=self.metadata).classifications
        except grpc.RpcError as error:
            return refused(error)
        return None


def refused(error: grpc.RpcError) -> Refused:
    """The error with its details decoded."""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    for detail in status.details if status else ():
        if detail.Unpack(info):
            break
    return Refused(error.code(), info.reason, error.details() or "")


def _bytes(text: str) -> int:
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    for unit, factor in units.items():
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    return int(text.removesuffix("B"))
