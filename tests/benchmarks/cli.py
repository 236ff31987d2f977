"""`usagi bench`: how fast the servers are beside raw ONNX Runtime, in one interleaved run."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.errors import ConfigurationError

SERVERS = ("raw", "grpcio", "native", "gateway")
MODEL_NAMES = ("tiny", "small", "medium")
PEERS = Path(__file__).parent / "peers"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `usagi bench`."""
    parser = commands.add_parser(
        "bench",
        help="measure the servers against raw ONNX Runtime (from a checkout)",
        description="Serves models with random weights as the product serves its own, and loads them from a process of "
        "its own. Every row is the median of interleaved repeats; items per CPU-second counts the server's whole "
        "process tree.",
    )
    add_options(parser)
    parser.set_defaults(command=run)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options, the same for `make bench`."""
    parser.add_argument("--models", type=_names(MODEL_NAMES), default=list(MODEL_NAMES), metavar="A,B")
    parser.add_argument(
        "--servers", type=_names(SERVERS), default=list(SERVERS), metavar="A,B", help=", ".join(SERVERS)
    )
    parser.add_argument("--peers", type=_comma, default=[], metavar="A,B", help="scripts of tests/benchmarks/peers")
    parser.add_argument("--inflight", type=_numbers, default=[1, 32], metavar="1,32", help="closed loop: calls at once")
    parser.add_argument("--rate", type=float, action="append", default=[], help="open loop: calls a second; repeatable")
    parser.add_argument("--slo", metavar="p99=50ms", help="search the highest rate that keeps this")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a window (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="threads that run graphs (default: the CPU quota)")
    parser.add_argument("--generator", choices=("auto", "h2load", "grpc"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for CSV, JSON, picture")
    parser.add_argument("--compare", type=Path, metavar="SAVED", help="bench.json of an earlier run of this session")


def run(options: argparse.Namespace) -> int:
    """Measures, prints, saves.

    Raises:
        ConfigurationError: something is missing, or an option is wrong.
    """
    try:
        from rich.console import Console

        from tests.benchmarks import generators, report, rows
        from tests.benchmarks.suite import Objective
    except ImportError as error:
        raise ConfigurationError(f"{error.name} is missing: `make install` sets up what `usagi bench` needs") from error
    try:
        objective = Objective.parse(options.slo) if options.slo else None
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    saved = rows.Run.load(options.compare) if options.compare else None
    console = Console()
    console = console if console.is_terminal else Console(width=150)
    if options.generator == "auto" and not generators.has_h2load():
        console.print(f"{generators.MISSING.partition(' (')[0]}; the load comes from grpc.aio, which slows the machine")
    collected = measure(options, objective, console)
    settings = {**rows.machine(), "command": _command(options), "repeats": options.repeats, "seconds": options.seconds}
    finished = rows.Run(rows.medians(collected), collected, settings)
    report.show(finished.rows, console)
    if saved is not None:
        report.compare(finished, saved, console)
    finished.save(options.out)
    report.picture(finished.rows, options.out / "bench.png")
    console.print(f"written to {options.out}/bench.json, bench.csv, bench.png")
    return 0


def measure(options: argparse.Namespace, objective: Any, console: Any) -> list[Any]:
    """All repeats, row by row."""
    from shared.serving.cpu import compute_threads
    from tests.benchmarks.models import MODELS
    from tests.benchmarks.raw import RawModel
    from tests.benchmarks.rows import with_shares
    from tests.benchmarks.suite import Probe, Settings, highest_rate, one_repeat

    settings = Settings(options.seconds, options.generator)
    with tempfile.TemporaryDirectory(prefix="usagi-bench-") as name, console.status("starting") as status:
        root = Path(name) / "models"
        folders = {model: MODELS[model].publish(root) for model in options.models}
        threads = options.threads or compute_threads()
        raws = {model: RawModel(MODELS[model], folders[model] / "model.onnx", threads) for model in options.models}
        with contextlib.ExitStack() as running:
            servers = list(start(options, root, folders, running))
            probes = [
                Probe(server, MODELS[model], server.call(MODELS[model]), raws[model].answer(), settings)
                for model in options.models
                for server in servers
            ]
            collected: list[Any] = []
            for repeat in range(options.repeats):
                made = []
                steps = [*one_repeat(probes, raws, options.inflight, options.seconds)]
                steps += [lambda probe=probe, rate=rate: probe.open(rate) for probe in probes for rate in options.rate]
                for step in steps:
                    measured = step()
                    made.append(measured)
                    status.update(f"repeat {repeat + 1} of {options.repeats}: {', '.join(measured.key)}")
                collected += with_shares(made)
            if objective is not None:
                for probe in probes:
                    status.update(f"searching the highest rate of {probe.server.name}, {probe.model.name}")
                    best, _ = highest_rate(probe, objective)
                    words = f"{best.load}: {options.slo} kept" if best else "no rate keeps it"
                    console.print(f"{probe.model.name}, {probe.server.name}: {words}")
                    if best is not None:
                        collected.append(best.named(load=f"highest rate with {options.slo}"))
    return collected


def start(
    options: argparse.Namespace, root: Path, folders: dict[str, Path], running: contextlib.ExitStack
) -> Iterator[Any]:
    """The servers that the options name, running until the stack ends."""
    from tests.benchmarks import servers

    environment = {"USAGI_THREADS": options.threads}
    fronts = {}
    for front in ("grpcio", "native"):
        if front in options.servers or (front == "native" and "gateway" in options.servers):
            fronts[front] = running.enter_context(servers.service(front, [root], **environment))
    yield from (fronts[front] for front in fronts if front in options.servers)
    if "gateway" in options.servers:
        yield running.enter_context(servers.gateway(fronts["native"]))
    graphs = root.parent / "graphs"
    graphs.mkdir()
    for model, folder in folders.items():
        (graphs / f"{model}.onnx").symlink_to(folder / "model.onnx")
    for name in options.peers:
        script = PEERS / name
        if not script.exists():
            found = ", ".join(sorted(path.name for path in PEERS.iterdir() if path.suffix != ".py"))
            raise ConfigurationError(f"there is no peer `{name}`, only {found}")
        yield running.enter_context(servers.peer(script, graphs))


def _command(options: argparse.Namespace) -> str:
    words = [f"--models {','.join(options.models)}", f"--servers {','.join(options.servers)}"]
    if options.peers:
        words.append(f"--peers {','.join(options.peers)}")
    words += [f"--inflight {','.join(map(str, options.inflight))}", f"--repeats {options.repeats}"]
    return f"usagi bench {' '.join(words)} --seconds {options.seconds:g}"


def _comma(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in _comma(text)]
    if any(number < 1 for number in numbers):
        raise argparse.ArgumentTypeError(f"`{text}` has a number below 1")
    return numbers


def _names(known: tuple[str, ...]) -> Any:
    def parse(text: str) -> list[str]:
        names = _comma(text)
        if unknown := sorted({*names} - {*known}):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is unknown; known are {', '.join(known)}")
        return names

    return parse
