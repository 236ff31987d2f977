"""What API keys and TLS cost: `python -m tests.benchmarks.api_keys`.

CPU of Envoy for a call of 16 bytes through real gateways in turns: without keys, with a key, with a key that has a
rate, with a wrong key, which is refused, and without keys over TLS.
"""

import contextlib
import dataclasses
import statistics
import tempfile
import threading
import time
from pathlib import Path

import grpc
import tyro
from grpc_health.v1 import health_pb2
from inference import open_inference_grpc_pb2_grpc as pb_grpc
from usagi.vision.v1 import vision_service_pb2_grpc as vision_grpc
from usagi.vision.v1.vision_service_pb2 import ClassifyImageRequest

from services.gateway.tls import AUTHORITY, make_certificate
from shared.api_keys import KeyFile, make_key, new_secret, parse_rate
from shared.testing.graphs import publish_affine
from tests.benchmarks.canary import call_many, child_named, cpu_seconds
from tests.services.gateway.processes import free_ports, process, running_gateway, wait_for_health


@dataclasses.dataclass(frozen=True)
class KeysCost:
    """Measures API keys."""

    calls: int = 3000
    """Calls of each turn."""
    repeats: int = 5
    """Turns of each kind."""
    callers: int = 4
    """Calls in flight."""


def refuse_many(channel, count, callers, *metadata):
    stub = vision_grpc.VisionServiceStub(channel)

    def some():
        for _ in range(count // callers):
            with contextlib.suppress(grpc.RpcError):
                stub.ClassifyImage(ClassifyImageRequest(), metadata=metadata, timeout=10)

    threads = [threading.Thread(target=some) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main(config: KeysCost) -> None:
    """Prints Envoy's µs a call and calls a second, median and range."""
    secrets = {"plain": new_secret(), "rated": new_secret()}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        root = Path(folder)
        publish_affine(root / "models", service="vision")
        file = KeyFile(root / "keys")
        rates = {"plain": None, "rated": parse_rate("1000000/s")}
        file.save([make_key(name, "infer", secret, rates[name]) for name, secret in secrets.items()])
        (port,) = free_ports(1)
        quiet = {"USAGI_LOG_LEVEL": "WARNING"}
        service = {"USAGI_PORT": port, "USAGI_METRICS_PORT": 0, "USAGI_MODEL_ROOTS": root / "models", **quiet}
        running.enter_context(process("-m", "services.vision.serving", **service))
        ways = {}
        certificate = make_certificate(root / "tls")
        credentials = grpc.ssl_channel_credentials((root / "tls" / AUTHORITY).read_bytes())
        kinds_of_gateway = {
            "open": {},
            "keyed": {"USAGI_KEYS_FILE": file.path},
            "tls": {"USAGI_TLS_CERT": certificate},
        }
        for name, variables in kinds_of_gateway.items():
            variables = {"USAGI_UPSTREAM_VISION": f"127.0.0.1:{port}", **quiet, **variables}
            gateway = running.enter_context(running_gateway(**variables))
            opened = grpc.secure_channel(gateway.target, credentials) if name == "tls" else None
            channel = running.enter_context(opened or grpc.insecure_channel(gateway.target))
            wait_for_health(gateway.target, health_pb2.HealthCheckResponse.SERVING, "usagi.vision.v1.VisionService")
            ways[name] = channel, child_named(gateway.process.pid, "envoy")
        kinds = {
            "without keys": ("open", ()),
            "a key": ("keyed", (("authorization", f"Bearer {secrets['plain']}"),)),
            "a key with a rate": ("keyed", (("authorization", f"Bearer {secrets['rated']}"),)),
            "TLS": ("tls", ()),
            "a wrong key": ("keyed", (("authorization", f"Bearer {new_secret()}"),)),
        }
        found = {kind: [] for kind in kinds}
        for turn in range(config.repeats + 1):
            for kind, (way, metadata) in kinds.items():
                channel, pid = ways[way]
                before, started = cpu_seconds(pid), time.perf_counter()
                if kind == "a wrong key":
                    refuse_many(channel, config.calls, config.callers, *metadata)
                else:
                    call_many(pb_grpc.GRPCInferenceServiceStub(channel), config.calls, config.callers, *metadata)
                seconds = time.perf_counter() - started
                if turn:  # the first one warms
                    spent = 1e6 * (cpu_seconds(pid) - before) / config.calls
                    found[kind].append((spent, config.calls / seconds))
    for kind, rows in found.items():
        spent, rate = ([row[column] for row in rows] for column in (0, 1))
        print(
            f"{kind:18} {statistics.median(spent):6.1f} µs ({min(spent):.1f} to {max(spent):.1f})"
            f"  {statistics.median(rate):6.0f} calls/s"
        )


if __name__ == "__main__":
    main(tyro.cli(KeysCost, description=__doc__))
