"""`usagi canary`: spreads the calls that name no version over the versions of a model, by the gateway's canary file.

Whoever may write that file may command; there is no call for it. In containers:
`docker compose exec gateway python -m services.gateway canary ...`. Standard library only: that image has no more.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from services.gateway.canaries import STEPS, Canary, CanaryFile, NoCanary, find, share_of
from services.gateway.canary_status import addresses, status_lines
from services.gateway.config import CANARY_FILE, load_config
from services.gateway.keys_cli import add_keys_verbs
from services.gateway.tls_cli import add_tls_verbs
from shared.errors import InvalidInput
from shared.services_table import load_table

DEFAULT_STATE = "var/gateway"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `usagi canary`, `usagi keys` and `usagi tls`."""
    add_verbs(commands.add_parser("canary", help="spread a model's calls over its versions"))
    add_keys_verbs(commands.add_parser("keys", help="make, list and revoke API keys"))
    add_tls_verbs(commands.add_parser("tls", help="make a certificate for the gateway"))


def add_verbs(parser: argparse.ArgumentParser) -> None:
    """Adds set, status, promote, abort and clear."""
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    verb = _verb(verbs, "set", "give a version a share of the calls, or copies of calls")
    verb.add_argument("--stable", default="", help="version that gets what the others leave; needed for a new canary")
    share = verb.add_mutually_exclusive_group()
    share.add_argument("--weight", type=float, metavar="PERCENT", help="share of the calls that --version answers")
    share.add_argument(
        "--shadow",
        type=float,
        metavar="PERCENT",
        nargs="?",
        const=100.0,
        help="copy calls to --version",
    )
    verb.set_defaults(command=_set)
    _verb(verbs, "promote", "send every call to a version").set_defaults(command=_promote)
    _verb(verbs, "abort", "take a version out, or all but the stable one").set_defaults(command=_abort)
    _verb(verbs, "clear", "end the canary: the newest version answers").set_defaults(command=_clear)
    status = verbs.add_parser("status", help="show all canaries: each version's share, calls, errors and latency")
    status.add_argument("--seconds", type=float, default=0.0, help="count only the next so many seconds")
    status.add_argument(
        "--metrics",
        metavar="SERVICE=HOST:PORT",
        action="append",
        default=[],
        help="where a service's metrics are, if not where services.toml says",
    )
    status.set_defaults(command=_status)


def _verb(verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text)
    verb.add_argument("model", help="name of the model")
    verb.add_argument("--version", default="", help="a version of it")
    verb.add_argument("--service", default="", help="its domain; needed if there are several")
    return verb


def _file() -> CanaryFile:
    return CanaryFile(Path(os.environ.get("USAGI_STATE_DIR") or DEFAULT_STATE) / CANARY_FILE)


def _set(options: argparse.Namespace) -> int:
    file = _file()
    canaries = file.load()
    try:
        canary = find(canaries, options.model, options.service)
    except NoCanary:
        canary = Canary(_service(options.service), options.model, options.stable)
    if options.stable and options.stable != canary.stable:
        canary = Canary(canary.service, canary.model, options.stable)
    if options.version and options.weight is not None:
        canary = canary.with_weight(options.version, share_of(options.weight, "--weight"))
    elif options.version and options.shadow is not None:
        canary = canary.with_shadow(options.version, share_of(options.shadow, "--shadow"))
    elif options.version or options.weight is not None or options.shadow is not None:
        raise InvalidInput("--version", "goes with --weight or --shadow, and they with it")
    return _save(file, canaries, canary)


def _service(named: str) -> str:
    known = list(load_table().services)
    if named in known:
        return named
    if named or len(known) != 1:
        raise InvalidInput("--service", f"is {named!r}, expected one of {', '.join(known)}")
    return known[0]


def _promote(options: argparse.Namespace) -> int:
    file = _file()
    canaries = file.load()
    return _save(file, canaries, find(canaries, options.model, options.service).promoted(options.version))


def _abort(options: argparse.Namespace) -> int:
    file = _file()
    canaries = file.load()
    return _save(file, canaries, find(canaries, options.model, options.service).aborted(options.version))


def _clear(options: argparse.Namespace) -> int:
    file = _file()
    canaries = file.load()
    gone = find(canaries, options.model, options.service)
    file.save(canary for canary in canaries if canary.key != gone.key)
    print(f"{gone.service}/{gone.model}: the newest version answers")
    return 0


def _status(options: argparse.Namespace) -> int:
    canaries = _file().load()
    if not canaries:
        print("no canaries: the newest version of each model answers")
        return 0
    table = load_table()
    places = addresses(load_config(table=table), table, options.metrics)
    for line in status_lines(canaries, places, max(0.0, options.seconds)):
        print(line)
    return 0


def _save(file: CanaryFile, canaries: Sequence[Canary], changed: Canary) -> int:
    file.save([*(canary for canary in canaries if canary.key != changed.key), changed])
    print(_line(changed))
    return 0


def _line(canary: Canary) -> str:
    shares = [f"version {version} {share / STEPS:g}%" for version, share in canary.shares().items()]
    shadows = [f"version {version} shadows {share / STEPS:g}%" for version, share in canary.shadows.items()]
    return f"{canary.service}/{canary.model}: {', '.join([*shares, *shadows])}"
