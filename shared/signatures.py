"""Ed25519 signatures of model versions: made where models are published, checked where they are served.

What is signed is the file that describes a version, whose checksums cover its graphs: `manifest.json`, beside which
lies `manifest.json.sig`, 64 bytes over the file's exact bytes. Any tool can check one:

    openssl pkeyutl -verify -pubin -inkey signing.pub -rawin -in manifest.json -sigfile manifest.json.sig

The arithmetic is openssl's command, which every image has already (ADR 15 says why it is not a Python package).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.artifacts import ArtifactError, write_atomically
from shared.errors import ConfigurationError

SUFFIX = ".sig"
SIGNATURE_BYTES = 64
MAX_SIGNED_BYTES = 16 * 1024 * 1024
_ED25519 = bytes.fromhex("302a300506032b6570032100")
"""SubjectPublicKeyInfo of an Ed25519 key, before its 32 bytes (RFC 8410)."""
_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----(.*?)-----END PUBLIC KEY-----", re.DOTALL)


@dataclass(frozen=True)
class TrustedKey:
    """A public key; `origin` is where it came from."""

    der: bytes
    origin: str

    @property
    def id(self) -> str:
        """Short name of the key: the beginning of its SHA-256."""
        return hashlib.sha256(self.der).hexdigest()[:16]

    @property
    def pem(self) -> bytes:
        """As openssl reads it."""
        return b"-----BEGIN PUBLIC KEY-----\n" + base64.encodebytes(self.der) + b"-----END PUBLIC KEY-----\n"


def read_trusted_keys(paths: Sequence[Path]) -> tuple[TrustedKey, ...]:
    """All public keys of PEM files, each with one or more.

    Raises:
        ConfigurationError: a file is missing or has no Ed25519 public key; or keys are named and there is no openssl.
    """
    keys: list[TrustedKey] = []
    for path in paths:
        try:
            text = path.read_bytes()
        except OSError as error:
            raise ConfigurationError(f"the trusted key {path} cannot be read: {error.strerror}") from error
        found = [_public_key(match, path) for match in _PEM.findall(text)]
        if not found:
            raise ConfigurationError(
                f"{path} has no PUBLIC KEY in PEM; `usagi sign new-key` writes one into a .pub file"
            )
        keys += found
    if keys:
        _run("version")
    return tuple(keys)


def _public_key(text: bytes, path: Path) -> TrustedKey:
    try:
        der = base64.b64decode(b"".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ConfigurationError(f"{path} is no PEM: {error}") from error
    if len(der) != len(_ED25519) + 32 or not der.startswith(_ED25519):
        raise ConfigurationError(f"{path} has a key of another kind, expected Ed25519")
    return TrustedKey(der, str(path))


def make_key(private: Path) -> TrustedKey:
    """Makes a key pair: `private`, readable by its owner only, and beside it the same name with `.pub`.

    Raises:
        ConfigurationError: one of them is there already, or cannot be written.
    """
    public = private.with_name(private.name + ".pub")
    for path in (private, public):
        if path.exists():
            raise ConfigurationError(f"{path} is there already; a key is not overwritten")
    made = _checked("genpkey", "-algorithm", "ed25519").stdout
    try:
        private.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(made)
            file.flush()
            os.fsync(file.fileno())
        pem = _checked("pkey", "-in", private, "-pubout").stdout
        write_atomically(public, pem)
    except OSError as error:
        raise ConfigurationError(f"{private} cannot be written: {error.strerror}") from error
    return read_trusted_keys([public])[0]


def sign_file(path: Path, private: Path, place: str = "") -> Path:
    """Signs a file; returns the signature's path.

    Args:
        path: the file.
        private: the private key.
        place: where the file must lie, if it does not say so itself; part of what is signed.

    Raises:
        ConfigurationError: the key cannot be read or is no Ed25519 key.
        ArtifactError: the file cannot be read.
    """
    content = place.encode() + _content(path)
    key = read_public_part(private)
    with tempfile.TemporaryDirectory(prefix="usagi-sign-") as folder:
        data, signature = Path(folder, "data"), Path(folder, "signature")
        data.write_bytes(content)
        _checked("pkeyutl", "-sign", "-inkey", private, "-rawin", "-in", data, "-out", signature)
        made = signature.read_bytes()
    if not _verifies(content, made, key):
        raise ConfigurationError(f"openssl made a signature with {private} that it does not accept; is it too old?")
    target = signature_path(path)
    write_atomically(target, made)
    return target


def read_public_part(private: Path) -> TrustedKey:
    """The public key of a private one.

    Raises:
        ConfigurationError: it cannot be read, or is of another kind.
    """
    if not private.is_file():
        raise ConfigurationError(f"there is no key {private}; `usagi sign new-key {private}` makes one")
    match = _PEM.search(_checked("pkey", "-in", private, "-pubout").stdout)
    if match is None:
        raise ConfigurationError(f"{private} is no private key in PEM")
    return _public_key(match.group(1), private)


def pipeline_place(service: str, name: str, version: int | str) -> str:
    """A pipeline's place: unlike a manifest its file does not say where it belongs."""
    return f"{service}/{name}/{version}\n"


def signature_path(path: Path) -> Path:
    """Where the signature of a file lies."""
    return path.with_name(path.name + SUFFIX)


def check_signed(path: Path, keys: Sequence[TrustedKey], place: str = "") -> tuple[bytes, TrustedKey]:
    """The content of a file that one of `keys` signed, and that key; what was checked is what is returned.

    `place`: see sign_file.

    Raises:
        ArtifactError: it cannot be read, is not signed, or by none of these keys.
    """
    content = _content(path)
    signature = signature_path(path)
    try:
        with signature.open("rb") as file:
            made = file.read(SIGNATURE_BYTES + 1)
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path} is not signed, and this server takes signed models only (USAGI_TRUSTED_KEYS): sign it, "
            f"`usagi sign add {path.parent} --key FILE`"
        ) from error
    except OSError as error:
        raise ArtifactError(f"{signature} cannot be read: {error.strerror}") from error
    try:
        for key in keys if len(made) == SIGNATURE_BYTES else ():
            if _verifies(place.encode() + content, made, key):
                return content, key
    except OSError as error:
        raise ArtifactError(
            f"{signature} cannot be checked: {error}; is there room in {tempfile.gettempdir()}?"
        ) from error
    trusted = ", ".join(key.id for key in keys)
    raise ArtifactError(
        f"{signature} is no signature of {path.name} by a trusted key ({trusted}): the file was changed after it was "
        "signed, or signed by somebody else"
    )


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_SIGNED_BYTES + 1)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    if not 0 < len(content) <= MAX_SIGNED_BYTES:
        raise ArtifactError(f"{path} has {len(content)} bytes or more, expected 1 to {MAX_SIGNED_BYTES}")
    return content


def _verifies(content: bytes, signature: bytes, key: TrustedKey) -> bool:
    with tempfile.TemporaryDirectory(prefix="usagi-verify-") as folder:  # openssl wants to know a file's size
        data, made, public = (Path(folder, name) for name in ("data", "signature", "key"))
        data.write_bytes(content)
        made.write_bytes(signature)
        public.write_bytes(key.pem)
        done = _run("pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", data, "-sigfile", made)
    return done.returncode == 0 and b"Signature Verified Successfully" in done.stdout


def _checked(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    done = _run(*arguments)
    if done.returncode:
        cause = done.stderr.decode(errors="replace").strip()[-300:]
        raise ConfigurationError(f"openssl {arguments[0]} fails: {cause}")
    return done


def _run(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    command = ["openssl", *map(str, arguments)]
    try:
        return subprocess.run(  # noqa: S603  no shell
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigurationError(f"signatures need the openssl command, which does not run: {error}") from error
