"""The gateway's canaries: which versions of a model answer the calls that name none, and where that is kept.

A canary pins a stable version and gives others a share of the calls (weight) or copies of calls (shadow). Promote and
abort leave a pin, so that the next version that is published gets no call before somebody gives it a share.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from shared.errors import InvalidInput, UsagiError

STEPS = 100
"""Shares are kept in steps of 1/STEPS percent."""
WHOLE = 100 * STEPS
MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
FORMAT = 1


class NotStored(UsagiError):
    """The file of the canaries cannot be written or read, so nothing changed."""

    code = "FAILED_PRECONDITION"
    reason = "CANARIES_NOT_STORED"


class NoCanary(UsagiError):
    """The model has no canary."""

    code = "NOT_FOUND"
    reason = "CANARY_NOT_FOUND"


@dataclass(frozen=True)
class Canary:
    """How the calls of one model are spread.

    Attributes:
        service: its domain.
        model: its name.
        stable: the version that gets what the weights leave.
        weights: version -> share of the calls, in 1/10,000.
        shadows: version -> share of the calls that are copied to it, in 1/10,000; no version is in both.
    """

    service: str
    model: str
    stable: str
    weights: Mapping[str, int] = field(default_factory=dict)
    shadows: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not MODEL.fullmatch(self.model):
            raise InvalidInput("model", f"{self.model!r} cannot have a canary: letters, digits, `.`, `_` and `-` only")
        for version in (self.stable, *self.weights, *self.shadows):
            if not (version.isascii() and version.isdigit() and 0 < len(version) < 10):
                raise InvalidInput("version", f"is {version!r}, expected a positive integer as text")
        if self.stable in self.weights or self.stable in self.shadows:
            raise InvalidInput("version", f"{self.stable} is the stable version, whose share is what the others leave")
        if not all(0 <= share <= WHOLE for share in (*self.weights.values(), *self.shadows.values())):
            raise InvalidInput("weight_percent", "is not within 0 to 100")
        if sum(self.weights.values()) > WHOLE:
            given = ", ".join(f"version {version} {share / STEPS:g}%" for version, share in self.weights.items())
            raise InvalidInput("weight_percent", f"the weights are over 100% together ({given}); lower one first")

    @property
    def key(self) -> tuple[str, str]:
        """Service and model."""
        return self.service, self.model

    def shares(self) -> dict[str, int]:
        """Version -> share of the calls in 1/10,000, the stable one first."""
        return {self.stable: WHOLE - sum(self.weights.values()), **self.weights}

    def with_weight(self, version: str, share: int) -> Canary:
        """The same with another share for `version`, which is no shadow any more."""
        return replace(self, weights=_sorted({**self.weights, version: share}), shadows=_without(self.shadows, version))

    def with_shadow(self, version: str, share: int) -> Canary:
        """The same with copies of calls for `version`, which answers no call any more."""
        return replace(self, weights=_without(self.weights, version), shadows=_sorted({**self.shadows, version: share}))

    def promoted(self, version: str = "") -> Canary:
        """The same with every call on `version`; without it, on the only one besides the stable.

        Raises:
            InvalidInput: not a version of this canary, or several could be meant.
        """
        return Canary(self.service, self.model, self._named(version))

    def aborted(self, version: str = "") -> Canary:
        """The same without `version`, or with the stable one alone; raises as `promoted` does."""
        if not version:
            return Canary(self.service, self.model, self.stable)
        named = self._named(version)
        return replace(self, weights=_without(self.weights, named), shadows=_without(self.shadows, named))

    def _named(self, version: str) -> str:
        others = [*self.weights, *self.shadows]
        if not version and len(others) == 1:
            return others[0]
        if version not in others:
            known = ", ".join(others) or "none"
            raise InvalidInput("version", f"is {version!r}; besides the stable {self.stable} the canary has: {known}")
        return version


def share_of(percent: float, field_name: str) -> int:
    """Percent as a share in 1/10,000.

    Raises:
        InvalidInput: not within 0 to 100.
    """
    if not 0 <= percent <= 100:  # NaN too
        raise InvalidInput(field_name, f"is {percent:g}, expected 0 to 100 percent")
    return round(percent * STEPS)


def find(canaries: Iterable[Canary], model: str, service: str = "") -> Canary:
    """The canary of a model.

    Raises:
        InvalidInput: no model is named, or several services have one of this name.
        NoCanary: it has none.
    """
    if not model:
        raise InvalidInput("model", "is empty, expected the name of a model")
    canaries = list(canaries)
    found = [canary for canary in canaries if canary.model == model and service in ("", canary.service)]
    if len(found) > 1:
        services = ", ".join(canary.service for canary in found)
        raise InvalidInput("service", f"is empty, and {services} have such a canary")
    if not found:
        known = ", ".join(canary.model for canary in canaries) or "none"
        raise NoCanary(f"model `{model}` has no canary; canaries: {known}", metadata={"model": model})
    return found[0]


class CanaryFile:
    """Where the canaries outlast the gateway: one JSON file, replaced whole.

    Args:
        path: the file; its folder is made when needed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def signature(self) -> tuple[int, int]:
        """Changes whenever the file does; (0, 0) without one."""
        try:
            stat = self.path.stat()
        except OSError:
            return (0, 0)
        return stat.st_mtime_ns, stat.st_ino

    def load(self) -> tuple[Canary, ...]:
        """All canaries; none without a file.

        Raises:
            NotStored: the file is not one of ours, or cannot be read.
        """
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise NotStored(f"{self.path} has the format {content['format']}, expected {FORMAT}")
            return tuple(Canary(**entry) for entry in content["canaries"])
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, InvalidInput) as error:
            raise NotStored(f"{self.path} holds no canaries: {error}; repair or remove it") from error

    def save(self, canaries: Iterable[Canary]) -> None:
        """Replaces the file: whoever reads sees the old or the new, never a part.

        Raises:
            NotStored: it cannot be written; the old one stays.
        """
        content = {"format": FORMAT, "canaries": [asdict(canary) for canary in canaries]}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise NotStored(
                f"{self.path} cannot be written: {error.strerror}; nothing changed, "
                "give the gateway a writable folder (USAGI_STATE_DIR)"
            ) from error


def replace_file(path: Path, text: str) -> None:
    """Writes a file whole: a temporary one beside it, synced and renamed; raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sorted(shares: Mapping[str, int]) -> dict[str, int]:
    return {version: shares[version] for version in sorted(shares, key=int)}


def _without(shares: Mapping[str, int], version: str) -> dict[str, int]:
    return {known: share for known, share in shares.items() if known != version}
