"""Single characters as tokens."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from services.nlp.tokenizers.special import SPECIAL_PIECES, UNK
from shared.errors import ConfigurationError


class CharacterTokenizer:
    """Encodes text as ids of its characters; `pieces` by id, the first four are SPECIAL_PIECES."""

    def __init__(self, pieces: Sequence[str]) -> None:
        if tuple(pieces[: len(SPECIAL_PIECES)]) != SPECIAL_PIECES:
            raise ConfigurationError(
                f"a vocabulary must begin with {', '.join(SPECIAL_PIECES)}; export the model again"
            )
        self.pieces = tuple(pieces)
        self._ids = {piece: index for index, piece in enumerate(self.pieces)}

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """An id for each character; one never seen is `UNK`."""
        return [self._ids.get(character, UNK) for character in text]

    def split(self, text: str) -> list[str]:
        """The characters, unknown ones included."""
        return list(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ids are left out."""
        return "".join(self.pieces[index] for index in ids if index >= len(SPECIAL_PIECES))

    def to_json(self) -> str:
        """The vocabulary as JSON."""
        return json.dumps({"kind": "characters", "pieces": self.pieces}, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CharacterTokenizer:
        """Reads what `to_json` wrote.

        Raises:
            ConfigurationError: it is something else.
        """
        try:
            raw = json.loads(text)
            if raw["kind"] != "characters":
                raise ValueError(f"kind {raw['kind']}")
            return cls(raw["pieces"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"the vocabulary cannot be read: {error!r}; publish the model again") from error


def collect_characters(text: str, min_count: int = 1) -> CharacterTokenizer:
    """The vocabulary of the characters that occur at least `min_count` times, in the order of Unicode."""
    counts = Counter(text)
    return CharacterTokenizer([*SPECIAL_PIECES, *sorted(c for c, count in counts.items() if count >= min_count)])
