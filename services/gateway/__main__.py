"""The gateway's commands: `python -m services.gateway COMMAND`; `--help` lists them."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import uvloop

from services.gateway.admission import Keys
from services.gateway.cli import add_verbs
from services.gateway.config import GatewayConfig, load_config
from services.gateway.dashboard import dashboard
from services.gateway.envoy import bootstrap
from services.gateway.keys_cli import add_keys_verbs
from services.gateway.prometheus import scrape_config
from services.gateway.supervisor import Supervisor, envoy_command, write_configuration
from services.gateway.tls_cli import add_tls_verbs
from shared.errors import UsagiError
from shared.logs import configure_json
from shared.services_table import ServicesTable, load_table

COMMANDS = {
    "serve": "run Envoy and the catalog until SIGTERM (default)",
    "render": "print Envoy's configuration",
    "validate": "let Envoy check the configuration",
    "prometheus": "print Prometheus' configuration",
    "canary": "spread a model's calls over its versions; `canary --help` explains",
    "keys": "make, list and revoke API keys; `keys --help` explains",
    "tls": "make a certificate; `tls --help` explains",
    "dashboard": "print Grafana's dashboard",
}


def main() -> None:
    """Reads the command and the environment, and obeys."""
    description = "\n".join(f"{name:11} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m services.gateway",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", default="serve", choices=COMMANDS)
    if sys.argv[1:2] in (["canary"], ["keys"], ["tls"]):
        _verbs(sys.argv[1], sys.argv[2:])
    command = parser.parse_args().command
    table = load_table()
    try:
        sys.exit(_run(command, load_config(table=table), table))
    except UsagiError as error:
        sys.exit(f"usagi-gateway: {error.message}")


def _verbs(command: str, arguments: list[str]) -> NoReturn:
    parser = argparse.ArgumentParser(prog=f"python -m services.gateway {command}")
    {"canary": add_verbs, "keys": add_keys_verbs, "tls": add_tls_verbs}[command](parser)
    options = parser.parse_args(arguments)
    try:
        sys.exit(options.command(options))
    except UsagiError as error:
        sys.exit(f"usagi-gateway: {error.message}")


def _run(command: str, config: GatewayConfig, table: ServicesTable) -> int:
    if command == "render":
        print(json.dumps(bootstrap(config, table), indent=2))
        return 0
    if command == "prometheus":
        print(scrape_config(table), end="")
        return 0
    if command == "dashboard":
        print(dashboard(), end="")
        return 0
    if command == "validate":
        return validate(config, table)
    configure_json(config.log_level, service="gateway")
    code: int = uvloop.run(Supervisor(config, table).run())
    return code


def validate(config: GatewayConfig, table: ServicesTable, keys: Keys = None) -> int:
    """Envoy's own check of the configuration; its exit code."""
    with tempfile.TemporaryDirectory(prefix="usagi-gateway-") as folder:
        path = write_configuration(Path(folder), bootstrap(config, table, keys))
        return subprocess.run([*envoy_command(path), "--mode", "validate"], check=False).returncode


if __name__ == "__main__":
    main()
