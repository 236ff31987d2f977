"""Measures the serving engine against raw ONNX Runtime, in one run: `make bench`.

Every row is the median of interleaved repeats. Items per CPU-second counts the CPU of the server's whole process tree
(for the gateway row, Envoy's too) and is the figure that holds from run to run on a shared machine; the load generator
runs in a process of its own and its CPU is shown beside. Raw means ONNX Runtime alone, with as many threads as the
server has, each running whole batches.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
from inference import open_inference_grpc_pb2 as pb
from rich import box
from rich.console import Console
from rich.table import Table

from shared.artifacts import read_manifest
from shared.client.connection import SERVICE_HEADER
from shared.client.local import LocalStack, local_stack
from shared.serving.cpu import compute_threads
from shared.serving.session import OnnxSession
from shared.testing.graphs import publish_affine

METHOD = "/inference.GRPCInferenceService/ModelInfer"
TINY, FLOWERS = "tiny", "flowers-efficientnet-lite0"
BUNDLED = Path("deploy/models")


@dataclass(frozen=True)
class Case:
    """One model to measure: the graph, the shape of one item, the variant."""

    name: str
    model: str
    variant: str
    graph: Path
    input_name: str
    shape: tuple[int, ...]

    def item(self) -> np.ndarray[Any, Any]:
        """One input with real numbers in it."""
        return np.random.default_rng(0).random((1, *self.shape), dtype=np.float32)


@dataclass(frozen=True)
class Row:
    """One measurement; times in milliseconds, rates a second."""

    case: str
    path: str
    inflight: int
    items_per_second: float
    items_per_cpu_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    client_cpu: float
    errors: int


def cases(root: Path) -> list[Case]:
    """The tiny graph, and the shipped classifier in its variants."""
    tiny = publish_affine(root, service="vision", name=TINY, max_batch=32)
    made = [Case(TINY, TINY, "fp32", tiny / "model.onnx", "x", (4,))]
    folder = max((BUNDLED / "vision" / FLOWERS).iterdir(), key=lambda path: int(path.name))
    manifest = read_manifest(folder)
    for name, variant in manifest.variants.items():
        spec = manifest.inputs[0]
        made.append(Case(f"lite0 {name}", FLOWERS, name, folder / variant.file, spec.name, spec.shape[1:]))
    return made


def cpu_seconds(processes: list[int]) -> float:
    """CPU of some processes and all their descendants, in seconds."""
    ticks = os.sysconf("SC_CLK_TCK")
    parents: dict[int, int] = {}
    used: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(stat[1])
                used[int(entry.name)] = (int(stat[11]) + int(stat[12])) / ticks
    wanted = set(processes)
    while more := {child for child, parent in parents.items() if parent in wanted} - wanted:
        wanted |= more
    return sum(used.get(process, 0.0) for process in wanted)


def measure_raw(case: Case, batch: int, seconds: float) -> Row:
    """ONNX Runtime in this process, without any server."""
    session = OnnxSession(case.graph)
    feeds = {case.input_name: np.repeat(case.item(), batch, axis=0)}
    session.run(feeds)
    times: list[float] = []

    def loop() -> None:
        while time.perf_counter() < end:
            began = time.perf_counter()
            session.run(feeds)
            times.append(time.perf_counter() - began)

    threads = [threading.Thread(target=loop) for _ in range(compute_threads())]
    cpu, start = time.process_time(), time.perf_counter()
    end = start + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall, used = time.perf_counter() - start, time.process_time() - cpu
    return _row(case.name, f"raw, batch {batch}", len(threads), len(times) * batch, wall, used, times, 0.0, 0)


def _row(
    case: str,
    path: str,
    inflight: int,
    items: int,
    wall: float,
    used: float,
    times: list[float],
    client: float,
    errors: int,
) -> Row:
    p50, p95, p99 = np.percentile(times, [50, 95, 99]) * 1000
    return Row(case, path, inflight, items / wall, items / max(used, 1e-9), p50, p95, p99, client, errors)


def generate_load(target: str, request: bytes, inflight: int, seconds: float, results: Any) -> None:
    """The load generator's process: a closed loop of `inflight` calls."""

    async def main() -> None:
        times: list[float] = []
        errors = 0
        async with grpc.aio.insecure_channel(target) as channel:
            call = channel.unary_unary(METHOD)
            metadata = ((SERVICE_HEADER, "vision"),)
            await asyncio.gather(*(call(request, metadata=metadata) for _ in range(inflight)))
            end = time.perf_counter() + seconds

            async def caller() -> None:
                nonlocal errors
                while (began := time.perf_counter()) < end:
                    try:
                        await call(request, metadata=metadata)
                    except grpc.aio.AioRpcError:
                        errors += 1
                    times.append(time.perf_counter() - began)

            cpu, start = time.process_time(), time.perf_counter()
            await asyncio.gather(*(caller() for _ in range(inflight)))
            wall = time.perf_counter() - start
        results.put((times, wall, (time.process_time() - cpu) / wall, errors))

    asyncio.run(main())


def measure_served(case: Case, path: str, target: str, processes: list[int], inflight: int, seconds: float) -> Row:
    """One closed loop against a running server."""
    item = case.item()
    request = pb.ModelInferRequest(model_name=case.model)
    request.inputs.add(name=case.input_name, datatype="FP32", shape=item.shape)
    request.parameters["variant"].string_param = case.variant
    request.raw_input_contents.append(item.tobytes())
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    before = cpu_seconds(processes)
    arguments = (target, request.SerializeToString(), inflight, seconds, results)
    generator = context.Process(target=generate_load, args=arguments)
    generator.start()
    times, wall, client, errors = results.get(timeout=seconds + 60)
    used = cpu_seconds(processes) - before
    generator.join()
    return _row(case.name, path, inflight, len(times) - errors, wall, used, times, client, errors)


def plan(case: Case, stack: LocalStack, seconds: float) -> Iterator[Callable[[], Row]]:
    """The measurements of one case, in the order of one repeat."""
    vision = [stack.processes["vision"].pid]
    both = [*vision, stack.processes["gateway"].pid]
    for batch in (1, 8):
        yield lambda batch=batch: measure_raw(case, batch, seconds)
    address = stack.addresses["vision"]
    for inflight in (1, 32):
        yield lambda inflight=inflight: measure_served(case, "direct", address, vision, inflight, seconds)
        yield lambda inflight=inflight: measure_served(case, "gateway", stack.target, both, inflight, seconds)


def median_row(rows: list[Row]) -> Row:
    """Column-wise median of the repeats of one measurement."""
    first = rows[0]
    columns = list(zip(*(astuple(row)[3:] for row in rows), strict=True))
    return Row(first.case, first.path, first.inflight, *(statistics.median(column) for column in columns))


def show(rows: list[Row], console: Console) -> None:
    """Prints the table; the share is against the best raw row of the same case."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in (
        "model",
        "path",
        "in flight",
        "items/s",
        "items/CPU-s",
        "of raw",
        "p50 ms",
        "p99 ms",
        "client CPU",
        "errors",
    ):
        table.add_column(heading, justify="left" if heading in ("model", "path") else "right")
    for row in rows:
        best = max(other.items_per_cpu_second for other in rows if other.case == row.case and "raw" in other.path)
        share = f"{row.items_per_cpu_second / best:.0%}"
        figures = (f"{row.items_per_second:,.0f}", f"{row.items_per_cpu_second:,.0f}", share)
        table.add_row(
            row.case, row.path, str(row.inflight), *figures, f"{row.p50_ms:.2f}", f"{row.p99_ms:.2f}",
            f"{row.client_cpu:.2f}", str(int(row.errors)),
        )  # fmt: skip
    console.print(table)


def main() -> None:
    """Runs all measurements and writes them to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repeats (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a measurement (default: %(default)s)")
    parser.add_argument("--csv", type=Path, default=Path("out/bench.csv"), help="where to write (default: %(default)s)")
    options = parser.parse_args()
    console = Console()
    console = console if console.is_terminal else Console(width=110)
    collected: dict[tuple[str, str, int], list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "models"
        found = cases(root)
        os.environ.update(USAGI_MODEL_ROOTS=f"{root}:{BUNDLED}", USAGI_LOG_LEVEL="WARNING")
        with local_stack(Path(folder) / "logs", free_ports=True) as stack, console.status("measuring") as status:
            for repeat in range(options.repeats):
                for case in found:
                    for measure in plan(case, stack, options.seconds):
                        row = measure()
                        status.update(f"repeat {repeat + 1} of {options.repeats}: {row.case}, {row.path}")
                        collected.setdefault((row.case, row.path, row.inflight), []).append(row)
    rows = [median_row(repeats) for repeats in collected.values()]
    show(rows, console)
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    with options.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Row))
        writer.writerows(astuple(row) for row in rows)
    console.print(f"written to {options.csv}")


if __name__ == "__main__":
    main()
