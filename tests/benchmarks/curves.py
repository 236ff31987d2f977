"""What a call costs against one thing at a time: `python -m tests.benchmarks.curves`.

Curves: calls in flight (1 to 256), bytes of a call (16 B to 4 MB), models in memory of which one is called (1 to 50),
items that may run together (1 to 32), threads that run graphs. Every point is the median of interleaved repeats on the
native front; within a repeat all points of a curve follow one another, so that they meet the same machine.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console

from shared.serving.session import OnnxSession
from tests.benchmarks import report, rows, servers
from tests.benchmarks.models import INPUT, MODELS, BenchModel, echo
from tests.benchmarks.rows import Row
from tests.benchmarks.suite import Probe, Settings, checked_reply

IN_FLIGHT = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BYTES = (16, 1_024, 16_384, 131_072, 1_048_576, 4_194_304)
LOADED = (1, 5, 10, 25, 50)
BATCHES = (1, 2, 4, 8, 16, 32)
THREADS = (1, 2, 4)
QUEUE = 512
"""Waiting requests a server takes here, so that a curve shows cost and not refusals."""


@dataclass(frozen=True)
class CurvesConfig:
    """Measures cost curves."""

    curves: tuple[str, ...] = ("in flight", "bytes", "loaded models", "max batch", "threads")
    """Which."""
    repeats: int = 3
    """Interleaved."""
    seconds: float = 1.0
    """Length of a window."""
    out: Path = Path("out/curves")
    """Folder for JSON, CSV and the picture."""


@dataclass(frozen=True)
class Point:
    """One place on a curve."""

    curve: str
    x: int
    probe: Probe
    inflight: int

    def measure(self) -> Row:
        """A window under this load."""
        return self.probe.closed(self.inflight).named(server=self.curve, load=str(self.x))


class Bench:
    """Starts servers and makes the points that are measured on them."""

    def __init__(self, folder: Path, running: contextlib.ExitStack, settings: Settings) -> None:
        self._folder, self._running, self._settings = folder, running, settings

    def _serve(self, models: Sequence[BenchModel], **variables: object) -> dict[str, Probe]:
        """A server of its own that has all these models in memory; a probe for each."""
        root = Path(tempfile.mkdtemp(dir=self._folder))
        graphs = {model.name: model.publish(root) / "model.onnx" for model in models}
        started = servers.service("native", [root], USAGI_QUEUE_SIZE=QUEUE, **variables)
        server = self._running.enter_context(started)
        probes = {}
        for model in models:
            expected = next(iter(OnnxSession(graphs[model.name]).run({INPUT: model.item()}).values()))
            probes[model.name] = Probe(server, model, server.call(model), expected, self._settings)
            checked_reply(probes[model.name].call, expected)  # which loads it
        return probes

    def in_flight(self) -> Iterator[Point]:
        """Tiny and small models."""
        probes = self._serve([MODELS["tiny"], MODELS["small"]])
        for name, probe in probes.items():
            for x in IN_FLIGHT:
                yield Point(f"in flight, {name}", x, probe, x)

    def bytes(self) -> Iterator[Point]:
        """Float32 tensors that a graph averages."""
        models = [
            BenchModel(f"echo{size}", functools.partial(echo, size // 4), (size // 4,), 1, max_batch=8)
            for size in BYTES
        ]
        for x, probe in zip(BYTES, self._serve(models).values(), strict=True):
            yield Point("bytes", x, probe, 8)

    def loaded_models(self) -> Iterator[Point]:
        """Servers with so many small networks, of which the first is called."""
        for x in LOADED:
            copies = [replace(MODELS["tiny"], name=f"copy{number}") for number in range(x)]
            yield Point("loaded models", x, next(iter(self._serve(copies).values())), 32)

    def max_batch(self) -> Iterator[Point]:
        """The same networks with other bounds."""
        for name in ("tiny", "small"):
            models = [replace(MODELS[name], name=f"{name}{x}", max_batch=x) for x in BATCHES]
            for x, probe in zip(BATCHES, self._serve(models).values(), strict=True):
                yield Point(f"max batch, {name}", x, probe, 32)

    def threads(self) -> Iterator[Point]:
        """Servers that run so many graphs at once."""
        for x in THREADS:
            (probe,) = self._serve([MODELS["small"]], USAGI_THREADS=x).values()
            yield Point("threads", x, probe, 32)


def measure(config: CurvesConfig, console: Console) -> list[Row]:
    """Every repeat of every point."""
    collected = []
    with tempfile.TemporaryDirectory(prefix="usagi-curves-") as folder, console.status("starting") as status:
        for curve in config.curves:
            with contextlib.ExitStack() as running:
                bench = Bench(Path(folder), running, Settings(config.seconds))
                points = list(getattr(bench, curve.replace(" ", "_"))())
                for repeat in range(config.repeats):
                    for point in points:
                        status.update(f"{point.curve} {point.x}, repeat {repeat + 1} of {config.repeats}")
                        collected.append(point.measure())
    return collected


def picture(found: Sequence[Row], path: Path) -> None:
    """A panel for each curve: microseconds of the server's CPU a call, and its median time."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    curves = list(dict.fromkeys(one.server for one in found))
    figure, panels = pyplot.subplots(
        1, len(curves), figsize=(3.1 * len(curves), 3), layout="constrained", squeeze=False
    )
    for panel, curve in zip(panels[0], curves, strict=True):
        mine = [one for one in found if one.server == curve]
        x = [int(one.load) for one in mine]
        panel.plot(x, [one.cpu_us for one in mine], marker="o", color="#4c72b0", label="CPU µs a call")
        panel.plot(x, [1000 * one.p50_ms for one in mine], marker=".", color="#c44e52", label="median µs a call")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel(curve)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(config: CurvesConfig) -> None:
    """Measures, prints, saves."""
    console = Console()
    console = console if console.is_terminal else Console(width=150)
    collected = measure(config, console)
    settings = {**rows.machine(), "command": "python -m tests.benchmarks.curves", "repeats": config.repeats}
    run = rows.Run(rows.medians(collected), collected, {**settings, "seconds": config.seconds})
    report.show([one.named(stages={}) for one in run.rows], console)
    run.save(config.out, "curves")
    picture(run.rows, config.out / "curves.png")
    console.print(f"written to {config.out}/curves.json, curves.csv, curves.png")


if __name__ == "__main__":
    main(tyro.cli(CurvesConfig, description=__doc__))
