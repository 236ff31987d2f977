"""The table of services, `services/services.toml`, as frozen dataclasses: its one reader."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import ConfigurationError

ONLY = "USAGI_SERVICES"
TABLE = Path(__file__).resolve().parents[1] / "services" / "services.toml"


@dataclass(frozen=True)
class Gateway:
    """Ports of the gateway container, and the one message limit of client, gateway and services in bytes."""

    port: int
    admin_port: int
    catalog_port: int
    metrics_port: int
    max_message_bytes: int


@dataclass(frozen=True)
class Service:
    """One domain.

    Attributes:
        name: the domain, which is its network name too.
        title: for people.
        summary: what it does, in a few words.
        grpc_services: full names of its typed services.
        port: gRPC port in its container.
        metrics_port: Prometheus port in its container.
        local_port: gRPC port as a plain process.
        local_metrics_port: Prometheus port as a plain process.
    """

    name: str
    title: str
    summary: str
    grpc_services: tuple[str, ...]
    port: int
    metrics_port: int
    local_port: int
    local_metrics_port: int


@dataclass(frozen=True)
class ServicesTable:
    """The whole table; `services` by name, in the file's order."""

    gateway: Gateway
    services: dict[str, Service]


def load_table(path: Path = TABLE, only: str | None = None) -> ServicesTable:
    """Reads the table; a missing or unknown key is a TypeError that names it.

    Args:
        path: the table.
        only: names of the services that this deployment has, separated by spaces; the variable `USAGI_SERVICES` if not
            given. Empty means all.

    Raises:
        ConfigurationError: a name is not in the table.
    """
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    services = {
        name: _service(name, {**content["defaults"], **row}) for name, row in content.get("services", {}).items()
    }
    chosen = (os.environ.get(ONLY, "") if only is None else only).split()
    if unknown := sorted(set(chosen) - set(services)):
        raise ConfigurationError(f"{ONLY} names {', '.join(unknown)}, expected some of {', '.join(services)}")
    services = {name: service for name, service in services.items() if not chosen or name in chosen}
    gateway = Gateway(**{"metrics_port": content["defaults"]["metrics_port"], **content["gateway"]})
    return ServicesTable(gateway=gateway, services=services)


def _service(name: str, row: dict[str, Any]) -> Service:
    return Service(name=name, **{**row, "grpc_services": tuple(row["grpc_services"])})
