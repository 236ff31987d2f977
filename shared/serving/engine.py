"""The engine of one serving process: thread pools, repository and telemetry, made together and closed together."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from shared.errors import DeadlinePassed
from shared.serving.batching import ComputePool
from shared.serving.config import ServingConfig
from shared.serving.cpu import compute_threads
from shared.serving.models import Models
from shared.serving.pipelines.registry import PipelineRegistry
from shared.serving.pipelines.upstreams import Upstreams, upstream_addresses
from shared.serving.providers import parse_providers, usable_providers
from shared.serving.repository import ModelRepository, RepositoryOptions
from shared.serving.session import OnnxSession, Session
from shared.serving.telemetry import Telemetry
from shared.signatures import read_trusted_keys
from shared.trace_settings import trace_settings

if TYPE_CHECKING:
    from shared.serving.tracing import Tracing

log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Engine:
    """What every service's predictors run on.

    Args:
        service: the domain.
        config: see ServingConfig.
        open_session: makes a session from the path of a graph, by default as `config` says; tests pass their own.
        tracing: makes spans; None means as OpenTelemetry's variables say, which is not at all without them.

    Raises:
        ConfigurationError: OpenTelemetry's variables, the execution providers or the trusted keys cannot be used.
    """

    def __init__(
        self,
        service: str,
        config: ServingConfig,
        open_session: Callable[[Path | bytes], Session] | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        workers = config.threads or compute_threads()
        trusted = read_trusted_keys(config.trusted_keys)
        if trusted:
            log.info("signed models only", extra={"keys": [key.id for key in trusted]})
        self.service = service
        self.config = config
        self.telemetry = Telemetry(service, tracing or tracing_from_environment(service, config.replica))
        self.pool = ComputePool(workers)
        self._offload = ThreadPoolExecutor(workers, thread_name_prefix="pre")
        options = RepositoryOptions(
            queue_size=config.queue_size,
            memory_limit=config.model_memory_mb * 1_000_000,
            open_session=open_session or _session_opener(config),
            trusted_keys=trusted,
        )
        self.repository = ModelRepository(service, config.model_roots, self.pool, self.telemetry, options)
        upstreams = Upstreams(upstream_addresses(config.upstreams), config.max_message_bytes)
        capacity = config.queue_size + 8 * workers
        self.pipelines = PipelineRegistry(
            service, config.model_roots, self.repository, self.telemetry, upstreams, capacity, trusted
        )
        self.models = self.pipelines.caller.models = Models(self.repository, self.pipelines)

    async def start(self) -> None:
        """Loads and warms every model's `auto` variant, then checks the pipelines."""
        await self.repository.rescan(patient=True)
        await self.pipelines.rescan()

    async def watch(self) -> None:
        """Rescans the model roots for ever; what goes wrong is logged and tried again."""
        await asyncio.gather(self._repeat(self.repository.rescan), self._repeat(self.pipelines.rescan))

    async def _repeat(self, rescan: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(self.config.rescan_seconds)
            try:
                await rescan()
            except Exception:
                log.exception("rescan failed")

    async def offload(self, work: Callable[[], _T], deadline: float = float("inf")) -> tuple[_T, float]:
        """Runs decoding or other work of numpy and OpenCV off the event loop.

        Args:
            work: called in a thread.
            deadline: time.monotonic() after which the work is not begun.

        Returns:
            Its result and its seconds.

        Raises:
            DeadlinePassed: the deadline passed while it waited for a thread.
        """

        def timed() -> tuple[_T, float]:
            if time.monotonic() >= deadline:
                raise DeadlinePassed("the deadline passed while the request waited for preprocessing")
            started = time.perf_counter()
            return work(), time.perf_counter() - started

        return await asyncio.get_running_loop().run_in_executor(self._offload, timed)

    def close(self) -> None:
        """Ends the threads after their work."""
        self._offload.shutdown(wait=True)
        self.pool.close()
        self.telemetry.close()


def _session_opener(config: ServingConfig) -> Callable[[Path | bytes], Session]:
    """Sessions with the threads and the execution providers of `config`, as far as those run here."""
    asked = parse_providers(config.providers)
    usable = usable_providers(asked)
    log.info("providers", extra={"asked": list(asked), "providers": list(usable)})
    return functools.partial(OnnxSession, threads=config.intra_op_threads, providers=usable)


def tracing_from_environment(service: str, replica: str) -> Tracing | None:
    """What OpenTelemetry's variables ask for; its SDK is imported only then."""
    settings = trace_settings()
    if settings is None:
        return None
    from shared.serving.tracing import Tracing

    return Tracing(service, replica, settings)
