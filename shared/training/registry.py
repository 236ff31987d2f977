"""Builders by name, so that a command line can say which one it means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from shared.errors import ConfigurationError

T = TypeVar("T")


class Registry(Generic[T]):
    """Name -> builder. A name is given once; asking for an unknown one lists the known ones."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters a builder under a name.

        Raises:
            ConfigurationError: the name is taken.
        """

        def enter(entry: T) -> T:
            if name in self._entries:
                raise ConfigurationError(f"{self.kind} `{name}` is registered already; choose another name")
            self._entries[name] = entry
            return entry

        return enter

    def get(self, name: str) -> T:
        """The builder of a name.

        Raises:
            ConfigurationError: no such name.
        """
        if name not in self._entries:
            raise ConfigurationError(f"{self.kind} `{name}` is unknown; known: {', '.join(self) or 'none'}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries
