"""A real server on a real port inside the test's process, and sessions that a test holds in its hand."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.serving.config import ServingConfig
from shared.serving.engine import Engine
from shared.serving.server import ModelServer, Register
from shared.serving.session import Arrays, OnnxSession, Session

if TYPE_CHECKING:
    from shared.serving.tracing import Tracing

START_SECONDS = 30.0


def no_services(engine: Engine, server: Any) -> Sequence[str]:
    """A `Register` that adds nothing: the common services alone."""
    return []


@dataclass
class RunningServer:
    """A server in a thread of its own. `address` is `127.0.0.1:port`."""

    address: str
    engine: Engine
    server: ModelServer
    loop: asyncio.AbstractEventLoop

    def submit(self, coroutine: Any) -> Future[Any]:
        """Runs a coroutine on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)


@contextlib.contextmanager
def running_server(
    service: str,
    config: ServingConfig,
    register: Register = no_services,
    open_session: Callable[[Path | bytes], Session] | None = None,
    tracing: Tracing | None = None,
) -> Iterator[RunningServer]:
    """Runs a server on a free port until the block ends.

    Args:
        service: the domain.
        config: its ports are replaced by free ones, and its providers by USAGI_TEST_PROVIDERS where that is set.
        register: the domain's servicers.
        open_session: see Engine.
        tracing: see Engine.
    """
    providers = os.environ.get("USAGI_TEST_PROVIDERS", config.providers)  # on a machine with a GPU: cuda
    config = dataclasses.replace(config, port=0, metrics_port=0, providers=providers)
    started: Future[tuple[RunningServer, asyncio.Event]] = Future()

    async def main() -> None:
        engine = Engine(service, config, open_session, tracing)
        server = ModelServer(engine, register)
        try:
            await server.start()
        except BaseException as error:
            started.set_exception(error)
            raise
        stop = asyncio.Event()
        running = RunningServer(f"127.0.0.1:{server.port}", engine, server, asyncio.get_running_loop())
        started.set_result((running, stop))
        await stop.wait()
        await server.stop()

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    running, stop = started.result(START_SECONDS)
    try:
        yield running
    finally:
        running.loop.call_soon_threadsafe(stop.set)
        thread.join(START_SECONDS)


class GatedSession:
    """A real graph that runs only after `gate` is set, and counts its runs and their items.

    The first `free_runs` runs pass: they are the repository's warm-up.
    """

    def __init__(self, graph: Path | bytes, gate: threading.Event, free_runs: int = 2) -> None:
        self._inner = OnnxSession(graph)
        self._gate = gate
        self._free_runs = free_runs
        self.batches: list[int] = []

    def run(self, feeds: Arrays) -> dict[str, Any]:
        """Waits for the gate, then runs the graph."""
        if self._free_runs > 0:
            self._free_runs -= 1
            return self._inner.run(feeds)
        self.batches.append(next(iter(feeds.values())).shape[0])
        if not self._gate.wait(60):
            raise TimeoutError("the test never opened the gate")
        return self._inner.run(feeds)
