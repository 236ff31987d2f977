"""ONNX Runtime alone: the limit that a server is compared with, measured in the same window."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np

from shared.serving.session import OnnxSession
from tests.benchmarks.models import INPUT, BenchModel
from tests.benchmarks.rows import Row, row

BATCHES = (1, 2, 4, 8, 16)


class RawModel:
    """A session without spinning, run by as many threads as the server has, each with whole batches."""

    def __init__(self, model: BenchModel, graph: Path, threads: int) -> None:
        self._model, self._threads = model, threads
        self._session = OnnxSession(graph)
        for batch in reversed(BATCHES):
            self._session.run(self._feeds(batch))

    def _feeds(self, batch: int) -> dict[str, np.ndarray]:
        return {INPUT: np.repeat(self._model.item(), batch, axis=0)}

    def answer(self) -> np.ndarray:
        """What a server must answer to `item()`."""
        return next(iter(self._session.run(self._feeds(1)).values()))

    def measure(self, batch: int, seconds: float) -> Row:
        """Runs whole batches in all threads for about `seconds`."""
        feeds, times = self._feeds(batch), []

        def loop() -> None:
            while (began := time.perf_counter()) < end:
                self._session.run(feeds)
                times.append(time.perf_counter() - began)

        threads = [threading.Thread(target=loop) for _ in range(self._threads)]
        cpu, start = time.process_time(), time.perf_counter()
        end = start + seconds
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wall, used = time.perf_counter() - start, time.process_time() - cpu
        return row(
            "raw", self._model.name, f"batch {batch}", len(times) * batch, wall, used, np.array(times), inflight=batch
        )

    def lonely(self, seconds: float) -> Row:
        """One item after the other in one thread: what the lonely call is compared with."""
        threads, self._threads = self._threads, 1
        try:
            measured = self.measure(1, seconds)
        finally:
            self._threads = threads
        return measured.named(load="1 thread")
