"""API keys: the file that holds them, as hashes, and what reads, writes and checks it.

A line is a key: name, role, SHA-256 of the key in hex, and a rate if it has one:

    alice infer 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 100/s

A key is 256 random bits, so a plain hash is enough: there is nothing to guess. The file is replaced whole, and readers
look at it again, so that a key counts or ends at once. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shared.errors import ConfigurationError, InvalidInput
from shared.roles import ROLES

LOCAL_FILE = "var/keys/api-keys"
"""Where the keys are on a machine without containers."""
PREFIX = "usagi_"
"""Every key begins so, and scanners for leaked secrets know it by that."""
MAX_KEY = 128
BEARER = "bearer "
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
HASH = re.compile(r"[0-9a-f]{64}")
RATE = re.compile(r"([1-9][0-9]{0,8})/(s|min|h)")
SECONDS = {"s": 1, "min": 60, "h": 3600}
MODE = 0o600
HEADER = "# Usagi's API keys: name, role, SHA-256 of the key, rate. `usagi keys` writes this file.\n"


@dataclass(frozen=True)
class Rate:
    """`calls` in `seconds`; that many may also come at once."""

    calls: int
    seconds: int

    def __str__(self) -> str:
        unit = next(name for name, seconds in SECONDS.items() if seconds == self.seconds)
        return f"{self.calls}/{unit}"


@dataclass(frozen=True)
class ApiKey:
    """A key as the file knows it; without a rate, its calls are not counted."""

    name: str
    role: str
    sha256: str
    rate: Rate | None = None

    def __str__(self) -> str:
        return " ".join([self.name, self.role, self.sha256, *([str(self.rate)] if self.rate else [])])


def new_secret() -> str:
    """A key that nobody has yet."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(secret: str) -> str:
    """SHA-256 of a key, in hex."""
    return hashlib.sha256(secret.encode()).hexdigest()


def bearer_of(authorization: str) -> str:
    """The key in a header `authorization: Bearer KEY`; empty if there is none."""
    return authorization[len(BEARER) :] if authorization.lower().startswith(BEARER) else ""


def make_key(name: str, role: str, secret: str, rate: Rate | None = None) -> ApiKey:
    """The entry of a key.

    Raises:
        InvalidInput: the name or the role is none.
    """
    if not NAME.fullmatch(name):
        raise InvalidInput(
            "name", f"is {name!r}, expected 1 to 63 of a-z, 0-9, `.`, `_`, `-`, the first one of a-z, 0-9"
        )
    if role not in ROLES:
        raise InvalidInput("role", f"is {role!r}, expected {' or '.join(ROLES)}")
    return ApiKey(name, role, digest(secret), rate)


def parse_rate(text: str) -> Rate:
    """A rate such as `100/s`, `600/min`, `1000/h`.

    Raises:
        InvalidInput: it is none.
    """
    match = RATE.fullmatch(text)
    if match is None:
        raise InvalidInput("rate", f"is {text!r}, expected calls in a time, such as 100/s, 600/min or 1000/h")
    return Rate(int(match[1]), SECONDS[match[2]])


def parse_keys(text: str, source: str = "keys") -> tuple[ApiKey, ...]:
    """The keys of a file's text.

    Raises:
        ConfigurationError: a line is no key, or a name or a hash stands there twice; no message repeats a line's hash.
    """
    keys: list[ApiKey] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            key = _parse_line(line)
            if any(known.name == key.name for known in keys):
                raise InvalidInput("name", f"{key.name!r} stands there twice")
            if any(known.sha256 == key.sha256 for known in keys):
                raise InvalidInput("key", f"of {key.name!r} has the hash of another")
        except InvalidInput as error:
            raise ConfigurationError(f"{source}, line {number}: {error.message}") from error
        keys.append(key)
    return tuple(keys)


def _parse_line(line: str) -> ApiKey:
    name, role, sha256, *rest = [*line.split(), "", ""]
    rates = [text for text in rest if text]
    if not HASH.fullmatch(sha256) or len(rates) > 1:
        raise InvalidInput("key", "expected: name, role, SHA-256 in 64 hex digits and perhaps a rate, between blanks")
    known = make_key(name, role, "")
    return ApiKey(known.name, known.role, sha256, parse_rate(rates[0]) if rates else None)


class KeyFile:
    """The file of the keys.

    Args:
        path: where it is; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def exists(self) -> bool:
        """Whether keys are set at all; a file without a key in it sets them too, and lets nobody in."""
        return self.path.exists()

    def signature(self) -> tuple[int, int, int] | None:
        """Changes with the file; None without one."""
        with contextlib.suppress(OSError):
            found = self.path.stat()
            return found.st_mtime_ns, found.st_ino, found.st_size
        return None

    def load(self) -> tuple[ApiKey, ...]:
        """The keys, in the file's order.

        Raises:
            ConfigurationError: the file cannot be read or has a line that is no key.
        """
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no UTF-8"
            raise ConfigurationError(f"API keys cannot be read from {self.path}: {reason}") from error
        return parse_keys(text, str(self.path))

    @contextlib.contextmanager
    def changing(self) -> Iterator[list[ApiKey]]:
        """The keys, to be changed in the block and saved at its end; others who change them wait.

        Raises:
            ConfigurationError: the file cannot be read or written.
        """
        lock = self.path.with_name(f".{self.path.name}.lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            opened = lock.open("w")
        except OSError as error:
            raise ConfigurationError(f"API keys cannot be written to {self.path}: {error.strerror}") from error
        with opened:
            fcntl.flock(opened, fcntl.LOCK_EX)
            keys = list(self.load()) if self.exists() else []
            yield keys
            self.save(keys)

    def save(self, keys: Iterable[ApiKey]) -> None:
        """Replaces the file, readable by its owner only.

        Raises:
            ConfigurationError: it cannot be written; the old one stays.
        """
        text = HEADER + "".join(f"{key}\n" for key in keys)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(temporary, text)
            temporary.replace(self.path)
        except OSError as error:
            raise ConfigurationError(f"API keys cannot be written to {self.path}: {error.strerror}") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _write(self, path: Path, text: str) -> None:
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def find_key(keys: Iterable[ApiKey], secret: str) -> ApiKey | None:
    """The entry of a key that a caller presents; hashes are compared, so time tells nothing about the key."""
    if not 0 < len(secret) <= MAX_KEY:
        return None
    presented = digest(secret)
    return next((key for key in keys if key.sha256 == presented), None)
