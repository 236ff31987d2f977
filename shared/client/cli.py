"""The `usagi` command. Every domain adds its own sub-command from `services/<domain>/cli.py`; none is named here."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence

from google.protobuf import json_format
from rich import box
from rich.console import Console
from rich.table import Table
from usagi.model.v1 import model_service_pb2 as pb

from shared.client.connection import DEFAULT_TARGET, DEFAULT_TIMEOUT, CallFailed, Connection
from shared.client.models import ModelsClient
from shared.errors import UsagiError
from shared.measures import MEASURES
from shared.services_table import load_table

Command = Callable[[argparse.Namespace], int]

EPILOG = """examples:
  usagi vision classify tests/data/flowers/*.jpg     classify photos
  usagi nlp translate "show your own business ."     translate into Japanese
  usagi models                                       every model of every service
  usagi models flowers-efficientnet-lite0            one model's card
  usagi local                                        run everything on this machine, without Docker

The gateway is looked for at 127.0.0.1:8080; --target or USAGI_TARGET names another.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with 0, or 1 after an error, or 2 for wrong usage."""
    options = build_parser().parse_args(arguments)
    command: Command = options.command
    try:
        sys.exit(command(options))
    except CallFailed as error:
        sys.exit(_explain(error))
    except UsagiError as error:
        sys.exit(f"usagi: {error.message}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `usagi models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def build_parser() -> argparse.ArgumentParser:
    """The parser with the sub-commands of all domains."""
    parser = argparse.ArgumentParser(
        prog="usagi",
        description="Talk to Usagi's services through their gateway.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_models(commands)
    for module in (
        "shared.client.local",
        "shared.client.sign",
        "shared.client.traces",
        "tests.benchmarks.cli",
        "services.gateway.cli",
        *(f"services.{name}.cli" for name in load_table().services),
    ):
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module).add_commands(commands)
    return parser


def add_connection_options(parser: argparse.ArgumentParser) -> None:
    """Adds --target, --timeout, --key, --ca and --json, the same for every sub-command that calls a service."""
    target = os.environ.get("USAGI_TARGET", DEFAULT_TARGET)
    parser.add_argument("--target", default=target, help="host:port of the gateway (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=DEFAULT_TIMEOUT, help="deadline of a call in seconds (default: %(default)s)"
    )
    parser.add_argument("--key", help="API key; better in the variable USAGI_KEY, where other users cannot see it")
    parser.add_argument(
        "--ca",
        metavar="FILE",
        help="speak TLS and trust this file, or `system` for public authorities (default: USAGI_CA; without it no TLS)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line, instead of a table")


def connect(options: argparse.Namespace, service: str | None = None) -> Connection:
    """The connection that the options of `add_connection_options` describe."""
    return Connection(options.target, timeout=options.timeout, service=service, key=options.key, ca=options.ca)


def _explain(error: CallFailed) -> str:
    lines = [f"usagi: {error.code} ({error.reason}): {error.message}"]
    if error.retry_after is not None:
        lines.append(f"       try again in {error.retry_after:.1f} s")
    if error.code == "UNAUTHENTICATED":
        lines.append("       set USAGI_KEY to your key; `usagi keys make NAME` makes one where the gateway runs")
    if "request_id" in error.metadata:
        lines.append(f"       request id {error.metadata['request_id']}")
    return "\n".join(lines)


def _add_models(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("models", help="list the models, or show one model's card")
    parser.add_argument("name", nargs="?", help="a model: show its card")
    parser.add_argument("--service", help="ask one domain only, such as vision")
    add_connection_options(parser)
    parser.set_defaults(command=_models)


def _models(options: argparse.Namespace) -> int:
    with connect(options, options.service) as connection:
        client = ModelsClient(connection)
        if options.name:
            answer = client.get(options.name)
            print(answer.manifest_json if options.json else answer.card)
            return 0
        models = list(client.list())
    if options.json:
        for model in models:
            print(json.dumps(json_format.MessageToDict(model, preserving_proto_field_name=True)))
        return 0
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model", overflow="fold")
    table.add_column("variant")
    for heading in ("quality", "p50 ms", "MB"):
        table.add_column(heading, justify="right")
    table.add_column("state", overflow="fold")
    for model in models:
        state = pb.ModelState.Name(model.state).removeprefix("MODEL_STATE_").lower()
        name = f"{model.service}/{model.name}:{model.version}"
        if not model.variants:
            table.add_row(name, "", "", "", "", f"{state}: {model.reason}" if model.reason else state)
        for row, variant in enumerate(model.variants):
            table.add_row(
                name if row == 0 else "",
                variant.name,
                _quality(variant),
                _figure(variant, "latency_p50_ms", 1),
                f"{variant.size_bytes / 1e6:.1f}",
                f"{state}, in memory{_device(variant)}" if variant.loaded else state,
            )
    Console().print(table)
    return 0


def _device(variant: pb.Variant) -> str:
    """The processor that runs it, where that is not the CPU."""
    first = next(iter(variant.providers), "CPU").removesuffix("ExecutionProvider")
    return "" if first == "CPU" else f" of {first}"


def _quality(variant: pb.Variant) -> str:
    known = [measure for name, measure in MEASURES.items() if name in variant.metrics]
    return f"{known[0].name} {known[0].text(variant.metrics[known[0].name])}" if known else ""


def _figure(variant: pb.Variant, metric: str, digits: int) -> str:
    return f"{variant.metrics[metric]:.{digits}f}" if metric in variant.metrics else ""


if __name__ == "__main__":
    main()
