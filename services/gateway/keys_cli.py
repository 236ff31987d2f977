"""`usagi keys`: makes, lists and revokes API keys. The gateway and the services follow their file.

Whoever may write that file may make keys; there is no call for it. In containers: `make keys ARGS="make alice"`.
Standard library only: the gateway's image has no more.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from shared.api_keys import LOCAL_FILE, KeyFile, make_key, new_secret, parse_rate
from shared.errors import InvalidInput
from shared.roles import INFER, ROLES


def add_keys_verbs(parser: argparse.ArgumentParser) -> None:
    """Adds make, list and revoke."""
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    verb = verbs.add_parser("make", help="make a key and print it, this once; from the first one on, calls need a key")
    verb.add_argument("name", help="whose it is: stands in the access log, and is what `revoke` takes")
    verb.add_argument(
        "--role", choices=ROLES, default=INFER, help="admin may also load and unload models (default: %(default)s)"
    )
    verb.add_argument(
        "--rate", default="", metavar="N/s", help="calls that it may make, such as 100/s, 600/min, 1000/h"
    )
    verb.set_defaults(command=_make)
    verbs.add_parser("list", help="show all keys: names, roles, rates").set_defaults(command=_list)
    verb = verbs.add_parser("revoke", help="end a key: the next call with it is refused")
    verb.add_argument("name", help="as `list` shows it")
    verb.set_defaults(command=_revoke)


def key_file() -> KeyFile:
    """The file that `USAGI_KEYS_FILE` names."""
    return KeyFile(Path(os.environ.get("USAGI_KEYS_FILE") or LOCAL_FILE))


def _make(options: argparse.Namespace) -> int:
    file, secret = key_file(), new_secret()
    key = make_key(options.name, options.role, secret, parse_rate(options.rate) if options.rate else None)
    with file.changing() as keys:
        if any(known.name == key.name for known in keys):
            raise InvalidInput("name", f"{key.name!r} has a key; `revoke` it first, or take another name")
        keys.append(key)
    print(f"{_line(key.name, key.role, str(key.rate or ''))}; keep it, it is not stored:", file=sys.stderr)
    print(secret)
    return 0


def _list(options: argparse.Namespace) -> int:
    file = key_file()
    if not file.exists():
        print("no keys are set: everybody may call, and callers on this machine may load and unload models")
        return 0
    for key in file.load():
        print(_line(key.name, key.role, str(key.rate or "")))
    return 0


def _revoke(options: argparse.Namespace) -> int:
    file = key_file()
    with file.changing() as keys:
        left = [key for key in keys if key.name != options.name]
        if len(left) == len(keys):
            raise InvalidInput(
                "name", f"{options.name!r} has no key; known: {', '.join(key.name for key in keys) or 'none'}"
            )
        keys[:] = left
    print(f"{options.name}: revoked" + ("" if left else "; no key is left, so nobody comes in"))
    return 0


def _line(name: str, role: str, rate: str) -> str:
    return f"{name:24} {role:6} {rate}".rstrip()
