"""Ten minutes at half load while models are replaced: `python -m tests.load.soak`, by hand.

Real photos by the shipped classifier, and small tensors by a model of which a new version is published and an old one
deleted every few seconds. The highest rate is found first; then calls start at half of it, on time whether or not
earlier ones are answered, and latency counts from when a call should have started. No call may fail, and memory, open
files and threads of the server should be at the end what they were after the first minute.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
from inference import open_inference_grpc_pb2 as oip
from usagi.vision.v1 import vision_service_pb2 as pb

from shared.serving.front import FRONTS
from shared.testing.graphs import publish_affine
from tests.fuzz.gateway import gateway_before
from tests.fuzz.server import ROOT, FuzzedServer, fuzzed_server

MODEL = "flowers-efficientnet-lite0"
SEARCH_SECONDS = 10.0
IN_FLIGHT = 16
PATIENCE = 20.0
RELOAD_SECONDS = 5.0
KEPT_VERSIONS = 3
PHOTO_EVERY = 3
"""One call in so many is a photo."""
CLASSIFY = "/usagi.vision.v1.VisionService/ClassifyImage"
INFER = "/inference.GRPCInferenceService/ModelInfer"
VISION = (("usagi-service", "vision"),)


@dataclass
class Minute:
    """What happened in one minute; seconds of each answered call."""

    seconds: list[float] = field(default_factory=list)
    errors: collections.Counter[str] = field(default_factory=collections.Counter)


class Soak:
    """Callers of one server.

    Args:
        server: whose memory is watched.
        target: where the calls go.
        root: where versions are published.
    """

    def __init__(self, server: FuzzedServer, target: str, root: Path) -> None:
        self._server, self._target, self._root = server, target, root
        photos = sorted((ROOT / "tests/data/flowers").glob("*.jpg"))
        self._photos = [pb.ClassifyImageRequest(image=path.read_bytes(), model=MODEL) for path in photos]
        tensor = np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)
        self._tensor = oip.ModelInferRequest(model_name="affine", raw_input_contents=[tensor.tobytes()])
        self._tensor.inputs.add(name="x", datatype="FP32", shape=[1, 4])
        self._version = 2
        self.reloads = 0

    async def _call(self, channel: grpc.aio.Channel, number: int) -> str:
        """Empty, or why the call was not answered right."""
        try:
            if number % PHOTO_EVERY == 0:
                request = self._photos[number // PHOTO_EVERY % len(self._photos)].SerializeToString()
                answer = await channel.unary_unary(CLASSIFY)(request, timeout=PATIENCE, metadata=VISION)
                found = pb.ClassifyImageResponse.FromString(answer).classifications
                return "" if len(found) == 5 else "wrong answer"
            data = self._tensor.SerializeToString()
            answer = await channel.unary_unary(INFER)(data, timeout=PATIENCE, metadata=VISION)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        response = oip.ModelInferResponse.FromString(answer)
        scale = np.frombuffer(response.raw_output_contents[0], np.float32)[0]
        return "" if scale == int(response.model_version) else f"wrong answer: {scale} by {response.model_version}"

    async def highest_rate(self) -> float:
        """Calls a second with IN_FLIGHT callers, one after the other each."""
        ended = 0
        async with grpc.aio.insecure_channel(self._target) as channel:
            stop = time.monotonic() + SEARCH_SECONDS

            async def caller(number: int) -> None:
                nonlocal ended
                while time.monotonic() < stop:
                    problem = await self._call(channel, number)
                    assert not problem, problem
                    ended += 1
                    number += IN_FLIGHT

            await asyncio.gather(*(caller(number) for number in range(IN_FLIGHT)))
        return ended / SEARCH_SECONDS

    async def run(self, rate: float, minutes: int) -> list[Minute]:
        """Calls on time at `rate` a second; prints a line a minute."""
        results: list[Minute] = []
        reloading = asyncio.create_task(self._reload())
        running: set[asyncio.Task[None]] = set()
        async with grpc.aio.insecure_channel(self._target) as channel:
            started, number = time.monotonic(), 0

            async def one(number: int, due: float, minute: Minute) -> None:
                problem = await self._call(channel, number)
                if problem:
                    minute.errors[problem] += 1
                else:
                    minute.seconds.append(time.monotonic() - due)

            for index in range(minutes):
                minute = Minute()
                results.append(minute)
                while (due := started + number / rate) < started + 60 * (index + 1):
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
                    task = asyncio.create_task(one(number, due, minute))
                    running.add(task)
                    task.add_done_callback(running.discard)
                    number += 1
                print(f"{index + 1:3} {self._line(minute)}", *minute.errors.most_common(1), flush=True)
            while running:
                await asyncio.wait(running)
        reloading.cancel()
        return results

    async def _reload(self) -> None:
        """A new version every RELOAD_SECONDS, the oldest deleted; its scale is its number."""
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            self._version += 1
            arguments = {"service": "vision", "version": self._version, "scale": float(self._version)}
            await asyncio.to_thread(publish_affine, self._root, **arguments)
            old = self._root / f"vision/affine/{self._version - KEPT_VERSIONS}"
            await asyncio.to_thread(shutil.rmtree, old, ignore_errors=True)
            self.reloads += 1

    def _line(self, minute: Minute) -> str:
        ordered = sorted(minute.seconds) or [float("nan")]
        p50, p99 = statistics.median(ordered) * 1000, ordered[int(len(ordered) * 0.99)] * 1000
        process = Path(f"/proc/{self._server.process.pid}")
        files, threads = len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))
        return (
            f"{len(minute.seconds):7} answered {sum(minute.errors.values()):4} failed p50 {p50:6.1f} p99 {p99:7.1f} ms"
            f"   {self._server.memory() / 1e6:6.1f} MB {files:4} files {threads:3} threads {self.reloads:4} reloads"
        )


def main() -> int:
    """Returns 1 if a call failed or the server complained."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.soak")
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--front", choices=FRONTS, default="native")
    parser.add_argument("--gateway", action="store_true", help="through the real gateway")
    parser.add_argument("--rate", type=float, help="calls a second, instead of half of the highest rate")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        roots = (ROOT / "deploy/models",)
        server = stack.enter_context(fuzzed_server(folder, options.front, log_level="WARNING", roots=roots))
        for version, scale in ((1, 1.0), (2, 2.0)):
            publish_affine(folder / "models", service="vision", version=version, scale=scale)
        time.sleep(5)  # until the server has seen them
        target = stack.enter_context(gateway_before(server)) if options.gateway else server.address
        soak = Soak(server, target, folder / "models")
        highest = asyncio.run(soak.highest_rate())
        rate = options.rate or highest / 2
        way = f"{options.front}{', gateway' * options.gateway}"
        print(f"{way}: {highest:.0f} calls/s at most, {rate:.0f}/s from now on", flush=True)
        minutes = asyncio.run(soak.run(rate, options.minutes))
        errors = sum((minute.errors for minute in minutes), collections.Counter())
        print("\n".join([*(f"{count} x {what}" for what, count in errors.items()), *server.complaints()]))
        return 1 if errors or server.complaints() else 0


if __name__ == "__main__":
    sys.exit(main())
