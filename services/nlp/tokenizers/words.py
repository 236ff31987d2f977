"""Whole words as the report counts them: those seen at least twice have an id, all others are `<unk>`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from services.nlp.tokenizers.special import SPECIAL_PIECES, UNK
from shared.errors import ConfigurationError


class WordTokenizer:
    """Encodes words as ids; `pieces` by id, the first four are SPECIAL_PIECES."""

    def __init__(self, pieces: Sequence[str]) -> None:
        if tuple(pieces[: len(SPECIAL_PIECES)]) != SPECIAL_PIECES:
            raise ConfigurationError(
                f"a vocabulary must begin with {', '.join(SPECIAL_PIECES)}; export the model again"
            )
        self.pieces = tuple(pieces)
        self._ids = {piece: index for index, piece in enumerate(self.pieces)}

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, words: Iterable[str]) -> list[int]:
        """An id for each word."""
        return [self._ids.get(word, UNK) for word in words]

    def split(self, word: str) -> tuple[str, ...]:
        """The word itself."""
        return (word,)

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The words of ids; special ids but `UNK` are left out."""
        return [self.pieces[index] for index in ids if index >= UNK]

    def to_json(self) -> str:
        """The vocabulary as JSON."""
        return json.dumps({"kind": "words", "pieces": self.pieces}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> WordTokenizer:
        """Reads what `to_json` wrote.

        Raises:
            ConfigurationError: it is something else.
        """
        try:
            return cls(json.loads(text)["pieces"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"the vocabulary cannot be read: {error!r}; publish the model again") from error


def count_words(words: Iterable[str], min_count: int = 2) -> WordTokenizer:
    """The vocabulary of the words that occur at least `min_count` times, the most frequent first."""
    counts = Counter(words)
    kept = sorted(
        (word for word, count in counts.items() if count >= min_count), key=lambda word: (-counts[word], word)
    )
    return WordTokenizer([*SPECIAL_PIECES, *kept])
