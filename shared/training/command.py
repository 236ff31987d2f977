"""The command line that makes a run again, from its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

OF_THE_MACHINE = ("runs", "root")
"""Options that say where things lie, which no record needs."""


def command_line(module: str, config: Any, always: Sequence[str] = ()) -> str:
    """`python -m <module>` with the options that tyro would read this configuration from.

    Args:
        module: what to run.
        config: a dataclass of plain values with defaults; `quick`, where it has one, comes last.
        always: options that are written even where they have their default, in this order, first.
    """
    words = [f"python -m {module}", *(_option(name, getattr(config, name)) for name in always)]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in (*always, *OF_THE_MACHINE, "quick") and value != field.default:
            words.append(_option(field.name, value))
    return " ".join([*words, "--quick"] if getattr(config, "quick", False) else words)


def _option(name: str, value: object) -> str:
    flag = name.replace("_", "-")
    return f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}"
