"""`model.toml`: what an operator says about a model as a whole, beside the folders of its versions.

    versions = "all"                    # the default: every version answers, the newest is warm from the start
    versions = { latest = 2 }           # only the two newest that are not broken
    versions = { specific = [3, 7] }    # only these

    cache = { megabytes = 64 }          # keep answers, 64 MB of 10^6 bytes at most; without it, none

The manifest belongs to training and to one version; which versions answer is decided while serving, so it has a file of
its own. Of several model roots the first that has the file counts.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.artifacts import ArtifactError

CONFIG_NAME = "model.toml"
_KEYS = ("versions", "cache")


@dataclass(frozen=True)
class VersionPolicy:
    """Which versions answer: the `latest` so many, or the `specific` ones, or all when neither is set."""

    latest: int | None = None
    specific: frozenset[int] | None = None

    def select(self, numbers: Collection[int]) -> set[int]:
        """Those of `numbers` that answer."""
        if self.latest is not None:
            return set(sorted(numbers)[-self.latest :])
        if self.specific is not None:
            return set(self.specific.intersection(numbers))
        return set(numbers)

    def __str__(self) -> str:
        if self.latest is not None:
            return f"latest {self.latest}"
        if self.specific is not None:
            return f"specific {', '.join(map(str, sorted(self.specific)))}"
        return "all"


@dataclass(frozen=True)
class ModelConfig:
    """What `model.toml` says; the defaults when there is none. `cache_bytes` is 0 without a response cache."""

    versions: VersionPolicy = VersionPolicy()
    cache_bytes: int = 0


def read_config(path: Path) -> ModelConfig:
    """Reads a `model.toml`; one that is not there means the defaults.

    Raises:
        ArtifactError: unreadable, not TOML, or with keys or values that mean nothing.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ModelConfig()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    unknown = sorted(set(raw) - set(_KEYS))
    if unknown:
        raise ArtifactError(f"{path}: `{unknown[0]}` means nothing here, expected {' or '.join(_KEYS)}")
    return ModelConfig(_policy(raw.get("versions", "all"), path), _cache_bytes(raw.get("cache"), path))


def _cache_bytes(raw: Any, path: Path) -> int:
    if raw is None:
        return 0
    size = raw.get("megabytes") if isinstance(raw, Mapping) and len(raw) == 1 else None
    if isinstance(size, bool) or not isinstance(size, int | float) or not 0 < size < float("inf"):
        raise ArtifactError(f"{path}: cache is {raw!r}, expected {{ megabytes = 64 }} with a number above 0")
    return round(size * 1_000_000)


def _policy(raw: Any, path: Path) -> VersionPolicy:
    if raw == "all":
        return VersionPolicy()
    if isinstance(raw, Mapping) and len(raw) == 1:
        kind, value = next(iter(raw.items()))
        if kind == "latest" and _is_version(value):
            return VersionPolicy(latest=value)
        if kind == "specific" and isinstance(value, list) and value and all(map(_is_version, value)):
            return VersionPolicy(specific=frozenset(value))
    raise ArtifactError(
        f'{path}: versions is {raw!r}, expected "all", {{ latest = 2 }} or {{ specific = [3, 7] }} with numbers above 0'
    )


def _is_version(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
