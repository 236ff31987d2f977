"""Answers of one model kept in memory, so that the same question is not computed twice: bounded bytes, LRU.

`model.toml` switches it on for a model (`cache = { megabytes = 64 }`). Its versions and variants share the bound, but
never an answer: each variant in memory has a section of its own, which ends with it. The key is the BLAKE2b digest of
all inputs: names, types, shapes, bytes. What is done with the outputs afterwards (which are wanted, as classes, as
text) is not part of it, since the cache holds what the graph gave.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from shared.serving.session import Array, Arrays

DIGEST_BYTES = 32
ENTRY_BYTES = 1024
"""What an entry takes besides its arrays' bytes: key, arrays' heads, dictionaries; measured, rounded up."""


class CachedAnswer(NamedTuple):
    """What a run gave to one request: read-only arrays of its own, and the size of that run's batch."""

    outputs: dict[str, Array]
    batch_size: int
    bytes: int


def digest_of(feeds: Arrays) -> bytes:
    """The digest of a request's inputs, whatever their order."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name in sorted(feeds):
        array = feeds[name]
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        if array.dtype == np.object_:
            for element in array.ravel():
                data = element if isinstance(element, bytes) else str(element).encode()
                digest.update(len(data).to_bytes(8, "little"))
                digest.update(data)
        else:
            digest.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    return digest.digest()


def answer_of(outputs: Arrays, batch_size: int) -> CachedAnswer:
    """Copies an answer: its arrays may be views that keep a whole batch in memory, and its caller may change them."""
    copies = {name: array.copy() for name, array in outputs.items()}
    for array in copies.values():
        array.flags.writeable = False
    return CachedAnswer(copies, batch_size, ENTRY_BYTES + sum(map(_bytes_of, copies.values())))


def _bytes_of(array: Array) -> int:
    if array.dtype != np.object_:
        return array.nbytes
    return array.nbytes + sum(len(element) if isinstance(element, bytes | str) else 8 for element in array.ravel())


class ResponseCache:
    """The answers of one model, all versions and variants together.

    Args:
        limit: bytes that they may take.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._answers: dict[tuple[int, bytes], tuple[CacheSection, CachedAnswer]] = {}  # the least recently used first
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._answers)

    def section(self, evicted: Callable[[], None]) -> CacheSection:
        """A part for one variant in memory; `evicted` is called for each of its answers that makes room for another."""
        return CacheSection(self, next(self._numbers), evicted)

    def _find(self, key: tuple[int, bytes]) -> CachedAnswer | None:
        found = self._answers.pop(key, None)
        if found is None:
            return None
        self._answers[key] = found
        return found[1]

    def _store(self, key: tuple[int, bytes], section: CacheSection, answer: CachedAnswer) -> None:
        if answer.bytes > self.limit or key in self._answers:
            return
        for old in self._oldest():
            if self.bytes + answer.bytes <= self.limit:
                break
            self._remove(old).evicted()
        self._answers[key] = section, answer
        self.bytes += answer.bytes
        section.bytes += answer.bytes

    def _oldest(self) -> Iterator[tuple[int, bytes]]:
        while self._answers:
            yield next(iter(self._answers))

    def _remove(self, key: tuple[int, bytes]) -> CacheSection:
        section, answer = self._answers.pop(key)
        self.bytes -= answer.bytes
        section.bytes -= answer.bytes
        return section

    def _drop(self, number: int) -> None:
        for key in [key for key in self._answers if key[0] == number]:
            self._remove(key)


class CacheSection:
    """The answers of one variant in memory; `bytes` is what they take."""

    def __init__(self, cache: ResponseCache, number: int, evicted: Callable[[], None]) -> None:
        self._cache, self._number = cache, number
        self._dropped = False
        self.evicted = evicted
        self.bytes = 0

    def find(self, digest: bytes) -> CachedAnswer | None:
        """The answer to the request of that digest, which is now the most recently used."""
        return self._cache._find((self._number, digest))

    def store(self, digest: bytes, answer: CachedAnswer) -> None:
        """Keeps an answer, unless it alone is over the limit or the variant is gone."""
        if not self._dropped:
            self._cache._store((self._number, digest), self, answer)

    def drop(self) -> None:
        """The variant leaves memory: so do its answers, and those of runs that still go on."""
        self._dropped = True
        self._cache._drop(self._number)
