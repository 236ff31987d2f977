"""Image classification, JPEG in and classes out, against the same work by hand: `python -m tests.benchmarks.jpeg`.

By hand means decoding, preprocessing and ONNX Runtime in one process, with as many threads as the server has, each with
one photo after the other. Both call the same functions; what differs is everything that makes a server.
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from usagi.vision.v1 import vision_service_pb2 as pb

from services.vision.preprocess import ClassificationPreprocessing, preprocess
from shared.artifacts import read_manifest
from shared.images import decode_image
from shared.serving.cpu import compute_threads
from shared.serving.session import OnnxSession
from tests.benchmarks import report, rows, servers
from tests.benchmarks.calls import Call
from tests.benchmarks.generators import Load, has_h2load, run_grpc, run_h2load
from tests.benchmarks.processes import cpu_seconds, memory_mb

BUNDLED = Path("deploy/models")
MODEL = "flowers-efficientnet-lite0"
PHOTO = Path("tests/data/flowers/daisy_1306119996_ab8ae14d72_n.jpg")
CLASSIFY = "/usagi.vision.v1.VisionService/ClassifyImage"


def photos() -> dict[str, bytes]:
    """A small photo as it is, and the same with 12 million pixels, as a telephone takes them."""
    small = PHOTO.read_bytes()
    pixels = cv2.imdecode(np.frombuffer(small, np.uint8), cv2.IMREAD_COLOR)
    _, large = cv2.imencode(".jpg", cv2.resize(pixels, (4000, 3000), interpolation=cv2.INTER_CUBIC))
    return {"240 pixels": small, "12 megapixels": large.tobytes()}


class ByHand:
    """The same functions without a server."""

    def __init__(self) -> None:
        folder = max((BUNDLED / "vision" / MODEL).iterdir(), key=lambda path: int(path.name))
        manifest = read_manifest(folder)
        self._settings = ClassificationPreprocessing.from_dict(manifest.preprocessing)
        self._input = manifest.inputs[0].name
        self._session = OnnxSession(folder / manifest.variants[manifest.auto_variant()].file)

    def classify(self, photo: bytes) -> tuple[np.ndarray, list[float]]:
        """Logits, and when decoding, preprocessing and running had ended."""
        moments = [time.perf_counter()]
        pixels = decode_image(photo, enough=self._settings.resize_side)
        moments.append(time.perf_counter())
        tensor = preprocess(pixels, self._settings)
        moments.append(time.perf_counter())
        (logits,) = self._session.run({self._input: tensor[None]}).values()
        return logits, [*moments, time.perf_counter()]

    def measure(self, name: str, photo: bytes, inflight: int, seconds: float) -> rows.Row:
        """In as many threads as can be busy."""
        self.classify(photo)
        times: list[list[float]] = []

        def loop() -> None:
            while time.perf_counter() < end:
                times.append(self.classify(photo)[1])

        threads = [threading.Thread(target=loop) for _ in range(min(inflight, compute_threads()))]
        cpu, start = time.process_time(), time.perf_counter()
        end = start + seconds
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wall, used = time.perf_counter() - start, time.process_time() - cpu
        stages = dict(zip(("decode", "preprocess", "infer"), 1000 * np.diff(times, axis=1).mean(axis=0), strict=True))
        whole = np.array([moments[-1] - moments[0] for moments in times])
        return rows.row(
            "raw", name, f"by hand, {inflight}", len(times), wall, used, whole, stages=stages, inflight=inflight
        )


def served(server: servers.Server, name: str, photo: bytes, inflight: int, seconds: float) -> rows.Row:
    """The typed call, in a closed loop."""
    call = Call(
        server.target,
        CLASSIFY,
        pb.ClassifyImageRequest(image=photo).SerializeToString(),
        headers={"usagi-service": "vision"},
    )
    run = run_h2load if has_h2load() else run_grpc
    pilot = run(call, Load(4 * inflight, inflight))
    before = cpu_seconds(server.processes)
    outcome = run(call, Load(max(2 * inflight, int(seconds * pilot.succeeded / pilot.seconds)), inflight))
    used = cpu_seconds(server.processes) - before
    return rows.row(
        server.name, name, f"{inflight} in flight", outcome.succeeded, outcome.seconds, used, outcome.latencies,
        inflight=inflight, errors=outcome.failed, memory_mb=memory_mb(server.processes),
        client_cpu=outcome.cpu_seconds / outcome.seconds,
    )  # fmt: skip


def main() -> None:
    """Prints and saves the table; `of raw` is against the work by hand with the same photos in flight."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    options = parser.parse_args()
    hand, collected = ByHand(), []
    with servers.service("native", [BUNDLED]) as native, servers.service("grpcio", [BUNDLED]) as grpcio:
        for _ in range(options.repeats):
            for name, photo in photos().items():
                for inflight in (1, 32):
                    made = [hand.measure(name, photo, inflight, options.seconds)]
                    made += [served(server, name, photo, inflight, options.seconds) for server in (native, grpcio)]
                    collected += rows.with_shares(made)
    finished = rows.Run(rows.medians(collected), collected, rows.machine())
    report.show(finished.rows, Console(width=150))
    finished.save(options.out, "jpeg")


if __name__ == "__main__":
    main()
