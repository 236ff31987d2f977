"""`usagi tls`: makes a certificate for the gateway, for one's own machines; others get theirs from an authority.

In containers `make up TLS=1` does it. Standard library and openssl only: the gateway's image has no more.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from services.gateway.tls import AUTHORITY, CERTIFICATE, DAYS, LOCAL_FOLDER, holds_long_enough, make_certificate


def add_tls_verbs(parser: argparse.ArgumentParser) -> None:
    """Adds make."""
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    verb = verbs.add_parser(
        "make", help="make a certificate and the authority that clients trust; one that still holds for a month stays"
    )
    folder = Path(os.environ.get("USAGI_TLS_CERT") or f"{LOCAL_FOLDER}/{CERTIFICATE}").parent
    verb.add_argument("--folder", type=Path, default=folder, help="where they go (default: %(default)s)")
    verb.add_argument(
        "--name", action="append", default=[], help="host name or address of the gateway, besides this machine's"
    )
    verb.add_argument("--days", type=int, default=DAYS, help="how long it holds (default: %(default)s)")
    verb.add_argument("--force", action="store_true", help="make a new one in any case")
    verb.add_argument("--print", action="store_true", help="print the authority, for clients on other machines")
    verb.set_defaults(command=_make)


def _make(options: argparse.Namespace) -> int:
    certificate, authority = options.folder / CERTIFICATE, options.folder / AUTHORITY
    if options.force or not authority.exists() or not holds_long_enough(certificate):
        make_certificate(options.folder, options.name, options.days)
        print(f"certificate in {certificate}, for clients: --ca {authority}", file=sys.stderr)
    if options.print:
        print(authority.read_text(encoding="ascii"), end="")
    return 0
