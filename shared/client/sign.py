"""`usagi sign`: signs model versions, so that servers that trust the key alone serve them (docs/signatures.md)."""

from __future__ import annotations

import argparse
from pathlib import Path

from shared.artifacts import MANIFEST_NAME, read_assets, read_manifest, verify_variant
from shared.errors import InvalidInput
from shared.signatures import check_signed, make_key, pipeline_place, read_trusted_keys, sign_file

PIPELINE_NAME = "pipeline.toml"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `sign` with its verbs."""
    parser = commands.add_parser("sign", help="sign model versions, for servers that take signed ones only")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    verb = verbs.add_parser("new-key", help="make a key pair: FILE, which stays secret, and FILE.pub for the servers")
    verb.add_argument("file", type=Path, metavar="FILE")
    verb.set_defaults(command=_new_key)
    verb = verbs.add_parser("add", help="sign versions")
    verb.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="<root>/<service>/<model>/<version>")
    verb.add_argument("--key", type=Path, required=True, metavar="FILE", help="the secret half of a key pair")
    verb.set_defaults(command=_add)
    verb = verbs.add_parser("check", help="check versions as a server does")
    verb.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="<root>/<service>/<model>/<version>")
    verb.add_argument("--trust", type=Path, nargs="+", required=True, metavar="FILE.pub", help="public keys")
    verb.set_defaults(command=_check)


def _new_key(options: argparse.Namespace) -> int:
    key = make_key(options.file)
    print(f"{options.file} is the secret, {key.origin} is for USAGI_TRUSTED_KEYS: key {key.id}")
    return 0


def _add(options: argparse.Namespace) -> int:
    for folder in options.folders:
        file, place = _signed_file(folder)
        if file.name == MANIFEST_NAME:
            _check_files(folder)
        print(sign_file(file, options.key, place))
    return 0


def _check(options: argparse.Namespace) -> int:
    keys = read_trusted_keys(options.trust)
    for folder in options.folders:
        file, place = _signed_file(folder)
        _, key = check_signed(file, keys, place)
        if file.name == MANIFEST_NAME:
            _check_files(folder)
        print(f"{folder}: signed by {key.id} ({key.origin})")
    return 0


def _signed_file(folder: Path) -> tuple[Path, str]:
    """The file of a version that is signed, and the place that is signed with it."""
    version = folder.resolve()
    if (version / PIPELINE_NAME).is_file():
        return folder / PIPELINE_NAME, pipeline_place(version.parent.parent.name, version.parent.name, version.name)
    if (version / MANIFEST_NAME).is_file():
        return folder / MANIFEST_NAME, ""
    raise InvalidInput("folder", f"{folder} has no {MANIFEST_NAME}; name the folder of a version")


def _check_files(folder: Path) -> None:
    """Nothing is signed, or called right, whose files are not those of its manifest."""
    manifest = read_manifest(folder.resolve())
    for variant in manifest.variants.values():
        verify_variant(folder, variant)
    read_assets(folder, manifest)
