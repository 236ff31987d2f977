"""What the response cache costs and saves: `python -m tests.benchmarks.cache`.

Each model of the bench is served twice by one process, without and with a cache. One caller asks in turns: without,
with a new question (a miss), with one that was asked before (a hit). Client and server share the process, so the
differences between the rows count, not the rows.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import grpc
import numpy as np
import tyro
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc

from shared.serving.config import ServingConfig
from shared.testing.server import running_server
from tests.benchmarks.models import MODELS

OFF, MISS, HIT = "off", "miss", "hit"


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Measures the cache."""

    seconds: float = 6.0
    """For each model, all three ways together."""
    off_only: bool = False
    """Without a cache alone; also for versions of the code that have none."""


def request_of(name, item, number):
    array = item.copy()
    array.flat[0] = number
    request = pb.ModelInferRequest(model_name=name)
    request.inputs.add(name="x", datatype="FP32", shape=array.shape)
    request.raw_input_contents.append(array.tobytes())
    return request


def measure(stub, model, config):
    """Way -> milliseconds of each call, and the same in CPU of the process."""
    ways = [OFF] if config.off_only else [OFF, MISS, HIT]
    walls, cpus = ({way: [] for way in ways} for _ in range(2))
    item = np.asarray(model.item(), np.float32)
    item = item if item.ndim == len(model.shape) + 1 else item[None]
    ends, number = time.monotonic() + config.seconds, 0
    while time.monotonic() < ends:
        number += 1
        for way in ways:
            name = model.name if way == OFF else f"{model.name}-cached"
            request = request_of(name, item, 0 if way == HIT else number)
            began, cpu = time.perf_counter(), time.process_time()
            response = stub.ModelInfer(request, timeout=30)
            walls[way].append(1000 * (time.perf_counter() - began))
            cpus[way].append(1000 * (time.process_time() - cpu))
            assert number == 1 or response.parameters["cached"].bool_param == (way == HIT)
    return walls, cpus


def main(config: CacheConfig) -> None:
    """Prints a table in Markdown."""
    print("| model | KB in | way | calls | p50 ms | CPU ms a call | against off |\n|---|---|---|---|---|---|---|")
    for model in MODELS.values():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            model.publish(root, service="test")
            model.publish(root, service="test", name=f"{model.name}-cached")
            if not config.off_only:
                (root / f"test/{model.name}-cached/model.toml").write_text("cache = { megabytes = 4 }")
            serving = ServingConfig(model_roots=(root,), threads=1, log_level="ERROR")
            with running_server("test", serving) as server, grpc.insecure_channel(server.address) as channel:
                stub = pb_grpc.GRPCInferenceServiceStub(channel)
                walls, cpus = measure(stub, model, config)
        base = statistics.median(walls[OFF])
        for way, times in walls.items():
            p50 = statistics.median(times)
            print(
                f"| {model.name} | {np.asarray(model.item()).nbytes / 1000:.1f} | {way} | {len(times)} | {p50:.3f} "
                f"| {statistics.mean(cpus[way]):.3f} | {p50 - base:+.3f} ms |"
            )


if __name__ == "__main__":
    main(tyro.cli(CacheConfig, description=__doc__))
