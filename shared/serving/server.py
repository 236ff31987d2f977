"""A serving process from start to end: build, warm, serve, drain.

On SIGTERM: health says NOT_SERVING, the server answers as before for `drain_seconds` while the gateway notices, then
takes no new calls and lets the running ones finish for `grace_seconds`, then the threads end.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import signal
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from inference import open_inference_grpc_pb2_grpc as inference_grpc
from usagi.model.v1 import model_service_pb2_grpc as model_grpc

from shared.errors import ConfigurationError
from shared.logs import configure_json
from shared.serving.admin import AdminGate
from shared.serving.config import ServingConfig
from shared.serving.direct_calls import DirectInfer
from shared.serving.engine import Engine
from shared.serving.front import Front, make_front
from shared.serving.handlers import CallHandlers
from shared.serving.health import Health
from shared.serving.model_service import ModelServicer
from shared.serving.open_inference import OpenInferenceServicer

log = logging.getLogger(__name__)

MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
COMMON_SERVICES = ("usagi.model.v1.ModelService", "inference.GRPCInferenceService")
Register = Callable[[Engine, Any], Sequence[str]]
"""Adds a domain's own servicers to a server (or what stands in for it) and returns their full names."""


class ModelServer:
    """One serving process's gRPC server.

    Args:
        engine: what it serves.
        register: adds the domain's own servicers.
    """

    def __init__(self, engine: Engine, register: Register) -> None:
        self.engine = engine
        self.port = 0
        self._config = engine.config
        self._register = register
        self._health = Health()
        self._services: list[str] = []
        self._ready = False
        self._watcher: asyncio.Task[None] | None = None
        self._front: Front | None = None

    async def start(self) -> None:
        """Opens the port at once, answering NOT_SERVING, then warms the models, then says SERVING.

        Raises:
            ConfigurationError: the port is taken.
        """
        gate = AdminGate(self._config.keys_file, required=self._config.keys_required)
        handlers = CallHandlers(self.engine.telemetry, self.engine.repository.overload, gate)
        registry: Any = handlers  # it takes registrations as a server does
        self._services = [*self._register(self.engine, registry), *COMMON_SERVICES]
        model_grpc.add_ModelServiceServicer_to_server(ModelServicer(self.engine), registry)
        inference: Any = OpenInferenceServicer  # some of its methods are set by name, which mypy cannot see
        servicer = inference(self.engine, lambda: self._ready)
        inference_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, registry)
        self._take_the_short_way(handlers, servicer)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, handlers)
        if self._config.reflection:
            names = [*self._services, "grpc.health.v1.Health", reflection.SERVICE_NAME]
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
                reflection.aio.ReflectionServicer(names), handlers
            )
        front = self._front = make_front(self._config.front, handlers, self._config.max_message_bytes)
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            self.port = front.listen(f"{self._config.host}:{self._config.port}")
        except (RuntimeError, OSError) as error:
            raise ConfigurationError(
                f"cannot listen on {self._config.host}:{self._config.port}: is another server there? set USAGI_PORT"
            ) from error
        await front.start()
        await self.engine.start()
        gc.collect()
        gc.freeze()  # what lives from now to the end is not worth scanning while calls wait
        self._watcher = asyncio.create_task(self.engine.watch())
        self._ready = True
        await self._say(health_pb2.HealthCheckResponse.SERVING)
        log.info("serving", extra={"port": self.port, "models": len(self.engine.models.versions())})

    def _take_the_short_way(self, handlers: CallHandlers, servicer: OpenInferenceServicer) -> None:
        """ModelInfer works on bytes, and where the front can do so without tasks."""
        infer: Any = grpc.unary_unary_rpc_method_handler(servicer.infer_bytes)
        service, _, method = MODEL_INFER.strip("/").rpartition("/")
        handlers.add_registered_method_handlers(service, {method: infer})
        handlers.answer_directly(MODEL_INFER, functools.partial(DirectInfer, self.engine, servicer.plans))

    async def _say(self, status: Any) -> None:
        for name in ("", *self._services):
            await self._health.set(name, status)

    async def stop(self) -> None:
        """Drains and stops; see the module's docstring."""
        self._ready = False
        await self._health.enter_graceful_shutdown()
        log.info("draining", extra={"seconds": self._config.drain_seconds})
        await asyncio.sleep(self._config.drain_seconds)
        self._health.end_watches()
        if self._front is not None:
            await self._front.stop(self._config.grace_seconds)
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        await self.engine.pipelines.close()
        await asyncio.to_thread(self.engine.close)
        log.info("stopped")


async def serve(engine: Engine, register: Register) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        ConfigurationError: a port is taken.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    metrics = None
    if engine.config.metrics_port:
        try:
            metrics = engine.telemetry.serve(engine.config.host, engine.config.metrics_port)
        except OSError as error:
            raise ConfigurationError(
                f"cannot serve metrics on {engine.config.host}:{engine.config.metrics_port}: {error.strerror}; "
                "is another server there? set USAGI_METRICS_PORT, 0 for none"
            ) from error
    server = ModelServer(engine, register)
    try:
        starting = asyncio.create_task(server.start())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
        else:
            starting.cancel()
        await stopping
        await server.stop()
    finally:
        if metrics is not None:
            metrics.shutdown()
            metrics.server_close()


def run(service: str, config: ServingConfig, register: Register) -> None:
    """The main function of a serving process: configures logs and serves until a signal ends it.

    Args:
        service: the domain.
        config: from the environment.
        register: adds the domain's own servicers.
    """
    configure_json(config.log_level, service=service, replica=config.replica)

    async def main() -> None:
        await serve(Engine(service, config), register)

    uvloop.run(main())
