"""Configuration from the environment: a frozen dataclass in, every bad value named in one message.

A field `queue_size: int = 100` is read from `USAGI_QUEUE_SIZE`. Supported types: str, int, float, bool, Path and
tuples of Path (separated by `:`, as in PATH).
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from shared.errors import ConfigurationError

PREFIX = "USAGI_"
_T = TypeVar("_T")


def from_environment(config: type[_T], environ: Mapping[str, str] | None = None) -> _T:
    """Builds `config` from the variables `USAGI_<FIELD>`; fields without a variable keep their default.

    Raises:
        ConfigurationError: missing or unreadable values, or values that `config.__post_init__` refuses with ValueError;
            all the unreadable ones in one message.
    """
    environ = os.environ if environ is None else environ
    types = typing.get_type_hints(config)
    values: dict[str, Any] = {}
    problems: list[str] = []
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        variable = PREFIX + field.name.upper()
        text = environ.get(variable)
        if text is None or text == "":
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                problems.append(f"{variable} is not set")
            continue
        try:
            values[field.name] = _PARSERS[types[field.name]](text)
        except ValueError:
            problems.append(f"{variable}={text!r} is not {_describe(types[field.name])}")
    if problems:
        raise ConfigurationError("; ".join(problems))
    try:
        return config(**values)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def _parse_bool(text: str) -> bool:
    if text.lower() in {"1", "true", "yes", "on"}:
        return True
    if text.lower() in {"0", "false", "no", "off"}:
        return False
    raise ValueError(text)


def _parse_paths(text: str) -> tuple[Path, ...]:
    return tuple(Path(part) for part in text.split(":") if part)


_PARSERS: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: float,
    bool: _parse_bool,
    Path: Path,
    tuple[Path, ...]: _parse_paths,
}


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(kind, str(kind))
