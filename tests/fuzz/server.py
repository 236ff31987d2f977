"""The vision service under attack: its own main function in a process of its own, on models that answer at once.

`--leak BYTES` makes every call lose that much memory for ever, which the test of memory must notice. `--methods FILE`
writes the path of every registered method, so that the attack can show that it knows them all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from onnx import TensorProto

from services.vision.preprocess import ClassificationPreprocessing
from services.vision.serving.__main__ import main as serve_vision
from shared.processes import die_with_parent
from shared.serving.calls import CallScope
from shared.serving.handlers import CallHandlers
from shared.testing.graphs import publish_affine, publish_colours, publish_identity
from tests.services.gateway.processes import ROOT, free_ports

CLASSIFIER = "colours"
SIDE = 8
"""Side of the classifier's tensor: pictures are what is tried here, not arithmetic."""
IDENTITIES = {
    "text": (TensorProto.STRING, "object"),
    "half": (TensorProto.FLOAT16, "float16"),
    "bytes8": (TensorProto.UINT8, "uint8"),
    "big": (TensorProto.INT64, "int64"),
    "flags": (TensorProto.BOOL, "bool"),
}
"""Models `y = x` `[B, 2]` of other element types."""
START_SECONDS = 60
HARMLESS = re.compile(
    r"(libpng (warning|error): |Corrupt JPEG data|Premature end of JPEG|Invalid SOS|Unsupported marker|Inconsistent"
    r"|Bogus|Unknown Adobe color|Warning: unknown JFIF|E\d{4} .* hpack_parser)"
)
"""What libpng, libjpeg and gRPC's core write to stderr about what a caller sent, past every log filter."""
GONE = "ExecuteBatchError raised in core"
"""What grpcio logs when a caller leaves while it is answered."""


def publish_models(root: Path) -> None:
    """Publishes the models that the attack knows."""
    publish_colours(root, ClassificationPreprocessing(size=SIDE, resize_side=SIDE).to_dict(), name=CLASSIFIER)
    publish_affine(root, service="vision", version=1, scale=2.0)
    publish_affine(root, service="vision", version=2, scale=3.0)
    for name, (element, dtype) in IDENTITIES.items():
        publish_identity(root, element, dtype, service="vision", name=name)


@dataclass
class FuzzedServer:
    """A running server; `log` is what it wrote to stderr."""

    address: str
    port: int
    front: str
    process: subprocess.Popen[bytes]
    log: Path
    methods_file: Path

    def memory(self, key: str = "VmRSS") -> int:
        """Bytes of the process now; `VmHWM` for the most that it ever had."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"no {key}: the server has ended")

    def registered(self) -> set[str]:
        """Paths of all methods that the server's handlers know."""
        return set(json.loads(self.methods_file.read_text()))

    def complaints(self) -> list[str]:
        """Lines of the log that no caller should be able to cause."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                if line.strip() and not HARMLESS.match(line):
                    found.append(line)
                continue
            if entry.get("level") in ("ERROR", "CRITICAL") and not entry["message"].startswith(GONE):
                found.append(line)
        return found


@contextlib.contextmanager
def fuzzed_server(
    folder: Path, front: str = "native", *, leak: int = 0, log_level: str = "INFO", roots: tuple[Path, ...] = ()
) -> Iterator[FuzzedServer]:
    """Runs the server until the block ends.

    Args:
        folder: an empty one, for models and log.
        front: what takes the calls; see shared/serving/front.py.
        leak: bytes that every call loses.
        log_level: INFO logs every call.
        roots: more model roots, behind the folder's own.
    """
    publish_models(folder / "models")
    (port,) = free_ports(1)
    environment = {
        "USAGI_PORT": port,
        "USAGI_METRICS_PORT": 0,
        "USAGI_MODEL_ROOTS": ":".join(map(str, (folder / "models", *roots))),
        "USAGI_FRONT": front,
        "USAGI_DEFAULT_CLASSIFIER": CLASSIFIER,
        "USAGI_LOG_LEVEL": log_level,
        "USAGI_THREADS": 2,
    }
    log, methods = folder / "server.log", folder / "methods.json"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.server", "--leak", str(leak), "--methods", str(methods)],
            cwd=ROOT,
            env={**os.environ, **{name: str(value) for name, value in environment.items()}},
            stdin=subprocess.DEVNULL,
            stderr=stream,
            preexec_fn=die_with_parent,
        )
    server = FuzzedServer(f"127.0.0.1:{port}", port, front, process, log, methods)
    try:
        _wait_until_serving(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_serving(server: FuzzedServer) -> None:
    deadline = time.monotonic() + START_SECONDS
    with grpc.insecure_channel(server.address, options=[("grpc.max_reconnect_backoff_ms", 200)]) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        while server.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(grpc.RpcError):
                if check(health_pb2.HealthCheckRequest(), timeout=1).status == health_pb2.HealthCheckResponse.SERVING:
                    return
            time.sleep(0.02)
    raise AssertionError(f"the server does not serve:\n{server.log.read_text()[-4000:]}")


def main() -> None:
    """Serves vision as `python -m services.vision.serving` does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--leak", type=int, default=0)
    parser.add_argument("--methods", type=Path)
    options = parser.parse_args()
    if options.leak:
        _leak_in_every_call(options.leak)
    if options.methods:
        _write_methods(options.methods)
    serve_vision()


def _leak_in_every_call(size: int) -> None:
    kept: list[bytearray] = []
    finish = CallScope.finish

    def leaking(self: CallScope, code: str, message: str = "") -> None:
        kept.append(bytearray(os.urandom(16) * (size // 16)))
        finish(self, code, message)

    CallScope.finish = leaking  # type: ignore[method-assign]


def _write_methods(path: Path) -> None:
    register = CallHandlers.add_registered_method_handlers

    def registering(self: CallHandlers, service_name: str, method_handlers: object) -> None:
        register(self, service_name, method_handlers)  # type: ignore[arg-type]
        path.write_text(json.dumps([method for method, _ in self.methods()]))

    CallHandlers.add_registered_method_handlers = registering  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
