"""What the environment sets for the gateway; `services/services.toml` has the defaults of all ports."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from shared.config import from_environment
from shared.errors import ConfigurationError
from shared.services_table import ServicesTable, load_table
from shared.trace_settings import TraceSettings, trace_settings

LOCAL_ORIGINS = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?"
OVERRIDE = "USAGI_UPSTREAM_"
CANARY_FILE = "canaries.json"
NOT_READ = ("USAGI_ADDRESSES", "USAGI_TRACES")
"""Fields that come from elsewhere than the variable of their name."""


@dataclass(frozen=True)
class Address:
    """A host name or IP, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """Configuration of the gateway; every field is `USAGI_<FIELD>` in the environment.

    Attributes:
        gateway_host: address that the public listener binds.
        gateway_port: its port.
        catalog_port: port of the catalog, on loopback.
        admin_port: port of Envoy's admin interface, on loopback.
        metrics_port: port that serves Envoy's Prometheus statistics and nothing else, since the admin port stays on
            loopback. 0 means the table's port with `network`, none with `local`.
        upstreams: `local` (127.0.0.1 and each service's local_port) or `network` (each service's name and port).
        cors_origins: regular expression of the web origins that may call from a browser. Only pages of this machine by
            default, or any web page could use a gateway on its visitor's machine.
        drain_seconds: after SIGTERM, the longest wait for running calls.
        keys_file: file of the API keys (shared/api_keys.py). While there is none, no keys are set.
        keys_required: a missing file lets nobody in, instead of everybody.
        tls_cert: PEM file with the certificate's chain; then callers from elsewhere must speak TLS (tls.py).
        tls_key: PEM file with its key; empty if that stands in the same file.
        state_dir: folder of what outlasts the gateway: the canaries. Empty means that nothing does.
        log_level: DEBUG, INFO, WARNING or ERROR.
        addresses: upstream of each service, from `upstreams` and `USAGI_UPSTREAM_<SERVICE>=host:port`.
        traces: where spans go, from OpenTelemetry's own variables (shared/trace_settings.py); None for nowhere.
    """

    gateway_host: str = "127.0.0.1"
    gateway_port: int = 0
    catalog_port: int = 0
    admin_port: int = 0
    metrics_port: int = 0
    upstreams: str = "local"
    cors_origins: str = LOCAL_ORIGINS
    drain_seconds: float = 20.0
    keys_file: str = ""
    keys_required: bool = False
    tls_cert: str = ""
    tls_key: str = ""
    state_dir: str = ""
    log_level: str = "INFO"
    addresses: Mapping[str, Address] = field(default_factory=dict)
    traces: TraceSettings | None = None

    @property
    def reachable_at(self) -> Address:
        """Where processes of the same machine find the public listener."""
        anywhere = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104
        return Address(anywhere.get(self.gateway_host, self.gateway_host), self.gateway_port)

    def __post_init__(self) -> None:
        problems = [
            f"USAGI_{name.upper()}={getattr(self, name)} is not a port, 1 to 65535"
            for name in ("gateway_port", "catalog_port", "admin_port", "metrics_port")
            if not 0 <= getattr(self, name) <= 65535
        ]
        if self.upstreams not in {"local", "network"}:
            problems.append(f"USAGI_UPSTREAMS={self.upstreams!r} is not local or network")
        if self.log_level not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
            problems.append(f"USAGI_LOG_LEVEL={self.log_level!r} is not DEBUG, INFO, WARNING or ERROR")
        for name in ("tls_cert", "tls_key"):
            path = getattr(self, name)
            if path and not os.access(path, os.R_OK):
                problems.append(f"USAGI_{name.upper()}={path} cannot be read; `usagi tls make` makes a certificate")
        if self.tls_key and not self.tls_cert:
            problems.append("USAGI_TLS_KEY is set and USAGI_TLS_CERT is not")
        if problems:
            raise ValueError("; ".join(problems))


def load_config(environ: Mapping[str, str] | None = None, table: ServicesTable | None = None) -> GatewayConfig:
    """The configuration of this process.

    Raises:
        ConfigurationError: values that cannot be used, all in one message.
    """
    environ = os.environ if environ is None else environ
    table = table or load_table()
    problems: list[str] = []
    config = GatewayConfig()
    try:
        config = from_environment(GatewayConfig, {key: environ[key] for key in environ if key not in NOT_READ})
    except ConfigurationError as error:
        problems.append(error.message)
    addresses = default_addresses(table, config.upstreams)
    for variable in sorted(key for key in environ if key.startswith(OVERRIDE)):
        name = variable.removeprefix(OVERRIDE).lower()
        if name not in addresses:
            problems.append(f"{variable}: there is no service {name!r}; known: {', '.join(table.services)}")
            continue
        try:
            addresses[name] = _parse_address(environ[variable])
        except ValueError:
            problems.append(f"{variable}={environ[variable]!r} is not host:port")
    traces = None
    try:
        traces = trace_settings(environ)
    except ConfigurationError as error:
        problems.append(error.message)
    if problems:
        raise ConfigurationError("; ".join(problems))
    network_metrics = table.gateway.metrics_port if config.upstreams == "network" else 0
    return replace(
        config,
        gateway_port=config.gateway_port or table.gateway.port,
        catalog_port=config.catalog_port or table.gateway.catalog_port,
        admin_port=config.admin_port or table.gateway.admin_port,
        metrics_port=config.metrics_port or network_metrics,
        addresses=addresses,
        traces=traces,
    )


def default_addresses(table: ServicesTable, upstreams: str) -> dict[str, Address]:
    """Where every service is, on one machine or on a network of containers."""
    if upstreams == "network":
        return {name: Address(name, service.port) for name, service in table.services.items()}
    return {name: Address("127.0.0.1", service.local_port) for name, service in table.services.items()}


def _parse_address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    if not host or not 0 < int(port) <= 65535:
        raise ValueError(text)
    return Address(host.strip("[]"), int(port))
