"""What the gateway's canaries say about a call: which version answers if the call names none, or that it is a shadow.

`usagi-versions: flowers=2/1,colours=1` asks for flowers by version 2, or else by version 1. `usagi-shadow: flowers=2`
marks the copy of a call: version 2 runs it, apart from the live metrics, and nobody reads its answer. Both headers are
the gateway's, which takes them off what callers send. A call never fails because of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache

from shared.errors import UsagiError

VERSIONS_HEADER = "usagi-versions"
SHADOW_HEADER = "usagi-shadow"
LIVE, SHADOW = "live", "shadow"


@dataclass(frozen=True)
class Traffic:
    """Model -> versions to try in this order; `shadow` says that the call is a copy whose answer is dropped."""

    versions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shadow: bool = False

    @property
    def kind(self) -> str:
        """The metrics' label."""
        return SHADOW if self.shadow else LIVE


UNROUTED = Traffic()
traffic: ContextVar[Traffic] = ContextVar("traffic", default=UNROUTED)
"""Of the call that the current task answers."""


class ShadowDropped(UsagiError):
    """The copy of a call is not run; no caller sees this."""

    code = "ABORTED"
    reason = "SHADOW_DROPPED"


@lru_cache(maxsize=256)
def parse_traffic(header: str, value: str) -> Traffic:
    """The meaning of one of the two headers; what cannot be read says nothing, rather than failing a call."""
    versions: dict[str, tuple[str, ...]] = {}
    for entry in value.split(","):
        model, separator, wanted = entry.strip().rpartition("=")
        if separator and model and wanted:
            versions[model] = tuple(wanted.split("/"))
    return Traffic(versions, header == SHADOW_HEADER)
