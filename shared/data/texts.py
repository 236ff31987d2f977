"""Text corpora, from their official homes to the zips that the programs read; each part is checked by its SHA-256.

GitHub packs an archive anew at each call, so that its bytes have no lasting digest; the files inside it have.
"""

from __future__ import annotations

import hashlib
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from shared.errors import ConfigurationError

ENJA = {
    "dev.en": "04a2673449770657fd5e3b963cb856be3130923212b6db8ac7eaeef18f06c041",
    "dev.ja": "cd534f56b8639dc130f86a365e5ec0aa70042000bdd740a622fbbf8b6be4acca",
    "train.en": "148b05dcd28638fe20ee84f2b1127001c80982be352007dda241fb759adadc76",
    "train.ja": "fc81a1434349ec98a449d7ae9cd2530057f689637684ecfed3501ea6a8a07ecc",
}
"""The files of small_parallel_enja that we use; its test files are left alone."""

SOSEKI = {
    "bottyan.txt": "d20d607c02bd3ffcbacc901665020bfaca0c330aaa991efa702bc157db00743c",
    "gubizinsou.txt": "34fef77fed0bed646d3f0b66ecc04ff8e52acb9a8afc682ce299e69b15db1f23",
    "kokoro.txt": "b1785931e33e54fa3cbccc937506c4fbde628c5a79c525a4b450aa9d456c1d6b",
    "kusamakura.txt": "7a5f19b157c944cdf7686728bb864a09ae1a4efcc374384b9f80097f4eae1b55",
    "meian.txt": "e77d514bcad2626584ec45d7cde10b54d2772a6a84f05a50cfc0b10559434ef6",
    "neko.txt": "6d8360963ffbf3e0c521d7dc072bdb452505788646caeb4db0bab3dc408464f5",
    "sanshiro.txt": "9abcd144e0bc0eefdf2787f985c3945cfe1e902314cd5881e4fc805c15561331",
}
"""Seven novels, their words separated by MeCab."""


def enja_from_tgz(source: Path, target: Path) -> None:
    """Writes our zip from the archive of the official repository.

    Raises:
        ConfigurationError: a file is missing or another one.
    """
    _members_from_tgz(source, target, ENJA)


def soseki_from_tgz(source: Path, target: Path) -> None:
    """Writes our zip from the archive of the official repository.

    Raises:
        ConfigurationError: a file is missing or another one.
    """
    _members_from_tgz(source, target, SOSEKI)


def shakespeare_from_txt(source: Path, target: Path) -> None:
    """Puts the official text, whose digest was checked already, into our zip."""
    _write(target, {"input.txt": source.read_bytes()})


def _members_from_tgz(source: Path, target: Path, expected: Mapping[str, str]) -> None:
    """Writes the expected files of an archive; one that lies there in parts (`name.000`, `name.001`, …) is joined."""
    contents: dict[str, bytes] = {}
    with tarfile.open(source, "r:gz") as archive:
        for member in sorted(archive.getmembers(), key=lambda entry: entry.name):
            path = PurePosixPath(member.name)
            name = path.stem if path.suffix[1:].isdigit() else path.name
            content = archive.extractfile(member) if name in expected else None
            if content is not None:
                contents[name] = contents.get(name, b"") + content.read()
    for name, digest in expected.items():
        if name not in contents:
            raise ConfigurationError(f"{source} holds no {name}; is it the archive of the official repository?")
        found = hashlib.sha256(contents[name]).hexdigest()
        if found != digest:
            raise ConfigurationError(f"{name} in {source} has sha256 {found[:12]}…, expected {digest[:12]}…")
    _write(target, {name: contents[name] for name in sorted(contents)})


def _write(target: Path, contents: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as output:
        for name, content in contents.items():
            output.writestr(zipfile.ZipInfo(name, date_time=(2026, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED)
