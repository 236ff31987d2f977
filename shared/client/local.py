"""Usagi without Docker: every service and the gateway as processes of this machine. `usagi local` and `usagi demo`.

The processes are the same modules that the containers run; only addresses differ. Ports come from the table of
services, or are free ones, so that a demo never collides with what already runs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console

from shared.api_keys import LOCAL_FILE
from shared.client.connection import SERVICE_HEADER
from shared.errors import ConfigurationError, Unreachable
from shared.processes import die_with_parent
from shared.services_table import ServicesTable, load_table

STARTUP_SECONDS = 60.0
STOP_SECONDS = 30.0


@dataclass
class LocalStack:
    """Running processes. `target` is the gateway's address; `addresses` those of the services by domain; `metrics`
    those of all /metrics, the gateway's included."""

    target: str
    addresses: dict[str, str]
    metrics: dict[str, str]
    logs: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)


@contextlib.contextmanager
def local_stack(logs: Path, *, free_ports: bool = False, certificate: str = "") -> Iterator[LocalStack]:
    """Starts everything, waits until the gateway says SERVING for all domains, and stops everything at the end.

    Args:
        logs: folder for one log file a process.
        free_ports: take free ports instead of those of the table.
        certificate: of the gateway, for TLS; callers on this machine may go without.

    Raises:
        ConfigurationError: a port of the table is taken.
        Unreachable: a process ended or did not become ready; the message shows the end of its log.
    """
    table = load_table()
    logs.mkdir(parents=True, exist_ok=True)
    ports = _ports(table, free_ports)
    stack = LocalStack(
        target=f"127.0.0.1:{ports['gateway']}",
        addresses={name: f"127.0.0.1:{ports[name]}" for name in table.services},
        metrics={name: f"127.0.0.1:{ports[f'{name}.metrics']}" for name in ("gateway", *table.services)},
        logs=logs,
    )
    try:
        keys = {} if free_ports or "USAGI_KEYS_FILE" in os.environ else {"USAGI_KEYS_FILE": LOCAL_FILE}
        for name in table.services:
            environment = {**keys, "USAGI_PORT": ports[name], "USAGI_METRICS_PORT": ports[f"{name}.metrics"]}
            _start(stack, name, f"services.{name}.serving", environment)
        upstreams = {f"USAGI_UPSTREAM_{name.upper()}": address for name, address in stack.addresses.items()}
        # a stack on free ports is a trial, which should neither see nor leave canaries
        state = os.environ.get("USAGI_STATE_DIR") or str(logs / "state" if free_ports else "var/gateway")
        gateway = {
            "USAGI_STATE_DIR": state,
            "USAGI_GATEWAY_PORT": ports["gateway"],
            "USAGI_ADMIN_PORT": ports["admin"],
            "USAGI_CATALOG_PORT": ports["catalog"],
            "USAGI_METRICS_PORT": ports["gateway.metrics"],
            **({"USAGI_TLS_CERT": certificate} if certificate else {}),
        }
        _start(stack, "gateway", "services.gateway", {**keys, **gateway, **upstreams})
        _wait_until_serving(stack)
        yield stack
    finally:
        _stop(stack)


def _ports(table: ServicesTable, free: bool) -> dict[str, int]:
    gateway = table.gateway
    ports = {"gateway": gateway.port, "admin": gateway.admin_port, "catalog": gateway.catalog_port}
    ports["gateway.metrics"] = gateway.metrics_port
    for name, service in table.services.items():
        ports[name], ports[f"{name}.metrics"] = service.local_port, service.local_metrics_port
    if not free:
        for name, port in ports.items():
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    raise ConfigurationError(f"port {port} ({name}) is taken: does Usagi already run on this machine?")
        return ports
    with contextlib.ExitStack() as held:
        sockets = {name: held.enter_context(socket.create_server(("127.0.0.1", 0))) for name in ports}
        return {name: opened.getsockname()[1] for name, opened in sockets.items()}


def _start(stack: LocalStack, name: str, module: str, environment: Mapping[str, object]) -> None:
    variables = {key: str(value) for key, value in environment.items()}
    with (stack.logs / f"{name}.log").open("wb") as log:
        stack.processes[name] = subprocess.Popen(
            [sys.executable, "-m", module],
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,  # safe here: no thread runs yet
        )


def _wait_until_serving(stack: LocalStack) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    with grpc.insecure_channel(stack.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while True:
            for name, process in stack.processes.items():
                if process.poll() is not None:
                    raise Unreachable(f"{name} ended with code {process.returncode}:\n{_tail(stack.logs, name)}")
            with contextlib.suppress(grpc.RpcError):
                if all(_serves(health, name) for name in stack.addresses):
                    return
            if time.monotonic() > deadline:
                tails = "\n".join(_tail(stack.logs, name) for name in stack.processes)
                raise Unreachable(f"not every service is SERVING after {STARTUP_SECONDS:.0f} s:\n{tails}")
            time.sleep(0.05)


def _serves(health: health_pb2_grpc.HealthStub, service: str) -> bool:
    """Whether a service answers SERVING through the gateway, which sends calls only to what it has seen healthy."""
    metadata = ((SERVICE_HEADER, service),)
    answer = health.Check(health_pb2.HealthCheckRequest(), timeout=2, wait_for_ready=True, metadata=metadata)
    serving: bool = answer.status == health_pb2.HealthCheckResponse.SERVING
    return serving


def _tail(logs: Path, name: str, lines: int = 8) -> str:
    path = logs / f"{name}.log"
    return f"--- {path}\n" + "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _stop(stack: LocalStack) -> None:
    for process in stack.processes.values():
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    for process in stack.processes.values():
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `usagi local` and `usagi demo`."""
    local = commands.add_parser("local", help="run every service and the gateway on this machine until Ctrl-C")
    local.add_argument("--logs", type=Path, default=Path("var/logs"), help="folder for logs (default: %(default)s)")
    local.add_argument("--tls", action="store_true", help="the gateway speaks TLS, by a certificate in var/tls")
    local.set_defaults(command=_local)
    demo = commands.add_parser("demo", help="start everything, call every domain on real input, stop")
    demo.add_argument("--out", type=Path, default=Path("out"), help="folder for pictures (default: %(default)s)")
    demo.add_argument("--target", help="use a running gateway at host:port instead of starting one")
    demo.set_defaults(command=_demo)


def _end_at_sigterm() -> None:
    """Ends this process as Ctrl-C would, so that everything that it started is stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _local(options: argparse.Namespace) -> int:
    _end_at_sigterm()
    console = Console()
    with console.status("starting"), contextlib.ExitStack() as running:
        certificate = _certificate() if options.tls else ""
        stack = running.enter_context(local_stack(options.logs, certificate=certificate))
        stay = running.pop_all()
    with stay:
        console.print(f"gateway  {stack.target}   gRPC, gRPC-Web and JSON   (logs in {options.logs})")
        if certificate:
            console.print(f"tls      usagi ... --ca {Path(certificate).with_name('ca.crt')}", markup=False)
        for name, address in stack.addresses.items():
            console.print(f"{name:8} {address}")
        console.print("try      usagi vision classify tests/data/flowers/*.jpg      Ctrl-C stops", markup=False)
        with contextlib.suppress(KeyboardInterrupt):
            while all(process.poll() is None for process in stack.processes.values()):
                time.sleep(0.5)
            ended = [name for name, process in stack.processes.items() if process.poll() is not None]
            raise Unreachable(f"{', '.join(ended)} ended:\n{_tail(options.logs, ended[0])}")
    return 0


def _certificate() -> str:
    """Path of the gateway's certificate, which its own command makes."""
    made = subprocess.run([sys.executable, "-m", "services.gateway", "tls", "make", "--folder", "var/tls"], check=False)
    if made.returncode:
        raise ConfigurationError("no certificate for TLS; the line above says why")
    return "var/tls/server.pem"


def _demo(options: argparse.Namespace) -> int:
    _end_at_sigterm()
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as running:
        target = options.target
        if target is None:
            started = time.perf_counter()
            with console.status("starting every service and the gateway"):
                target = running.enter_context(local_stack(options.out / "logs", free_ports=True)).target
            console.print(f"everything serves after {time.perf_counter() - started:.1f} s, gateway at {target}")
        for name in load_table().services:
            if importlib.util.find_spec(f"services.{name}.demo") is not None:
                console.rule(name)
                importlib.import_module(f"services.{name}.demo").run(target, options.out, console)
    pictures = ", ".join(str(path) for path in sorted(options.out.glob("*.png")))
    console.print(f"pictures: {pictures}")
    return 0
