"""What canary routing costs: `python -m tests.benchmarks.canary`.

CPU of Envoy and of the service for a call of 16 bytes through a real gateway, without and with a canary, in turns.
"""

import dataclasses
import os
import statistics
import tempfile
import threading
from pathlib import Path

import grpc
import numpy as np
import tyro
from grpc_health.v1 import health_pb2
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc

from services.gateway.canaries import Canary, CanaryFile
from services.gateway.config import CANARY_FILE
from shared.testing.graphs import publish_affine
from tests.services.gateway.processes import free_ports, process, running_gateway, wait_for_health

TICK = os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass(frozen=True)
class CanaryCost:
    """Measures canary routing."""

    calls: int = 3000
    """Calls of each turn."""
    repeats: int = 4
    """Turns of each kind."""
    callers: int = 4
    """Calls in flight."""


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def child_named(parent: int, name: str) -> int:
    for status in Path("/proc").glob("[0-9]*/status"):
        text = status.read_text(encoding="utf-8")
        if f"\nPPid:\t{parent}\n" in text and name in text.partition("\n")[0]:
            return int(status.parent.name)
    raise SystemExit(f"process {parent} has no child {name}")


def call_many(stub, count, callers, *metadata):
    """`count` calls, and the versions that answered."""
    request = pb.ModelInferRequest(model_name="affine")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(np.ones(4, np.float32).tobytes())
    answered = set()

    def some():
        for _ in range(count // callers):
            answer = stub.ModelInfer(request, metadata=(("usagi-service", "vision"), *metadata), timeout=10)
            answered.add(answer.model_version)

    threads = [threading.Thread(target=some) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answered


def main(config: CanaryCost) -> None:
    """Prints µs a call, median and range."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for version in (1, 2):
            publish_affine(root / "models", service="vision", version=version)
        file = CanaryFile(root / "state" / CANARY_FILE)
        file.save([])
        (port,) = free_ports(1)
        service = {"USAGI_PORT": port, "USAGI_METRICS_PORT": 0, "USAGI_MODEL_ROOTS": root / "models"}
        quiet = {"USAGI_LOG_LEVEL": "WARNING"}
        gateway_environment = {"USAGI_UPSTREAM_VISION": f"127.0.0.1:{port}", "USAGI_STATE_DIR": root / "state", **quiet}
        with (
            process("-m", "services.vision.serving", **service, **quiet) as server,
            running_gateway(**gateway_environment) as gateway,
            grpc.insecure_channel(gateway.target) as channel,
        ):
            wait_for_health(gateway.target, health_pb2.HealthCheckResponse.SERVING, "usagi.vision.v1.VisionService")
            stub = pb_grpc.GRPCInferenceServiceStub(channel)
            pids = {"Envoy": child_named(gateway.process.pid, "envoy"), "service": server.pid}
            found: dict[tuple[str, str], list[float]] = {}
            for _ in range(config.repeats):
                for kind, canaries, versions in (
                    ("without", [], {"2"}),
                    ("with", [Canary("vision", "affine", "1", {"2": 5000})], {"1", "2"}),
                ):
                    file.save(canaries)
                    while call_many(stub, 200, config.callers) != versions:
                        pass
                    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
                    call_many(stub, config.calls, config.callers)
                    for name, pid in pids.items():
                        spent = 1e6 * (cpu_seconds(pid) - before[name]) / config.calls
                        found.setdefault((name, kind), []).append(spent)
    for (name, kind), spent in sorted(found.items()):
        print(f"{name:8} {kind:8} {statistics.median(spent):6.1f} µs ({min(spent):.1f} to {max(spent):.1f})")


if __name__ == "__main__":
    main(tyro.cli(CanaryCost, description=__doc__))
