"""What the vocabularies of language models have in common, and which kind a file holds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Protocol

from services.nlp.tokenizers.characters import CharacterTokenizer
from services.nlp.tokenizers.text_bpe import KIND, TextBytePairTokenizer
from shared.errors import ConfigurationError


class TextTokenizer(Protocol):
    """Text to ids and back."""

    @property
    def pieces(self) -> tuple[str, ...]:
        """By id; the first four are SPECIAL_PIECES."""
        ...

    def __len__(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Ids of the pieces."""
        ...

    def split(self, text: str) -> list[str]:
        """The pieces as they stand in the text: joined they are the text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        ...

    def to_json(self) -> str:
        """The vocabulary as JSON."""
        ...


def read_text_tokenizer(text: str) -> TextTokenizer:
    """The vocabulary of a language model, of either kind.

    Raises:
        ConfigurationError: it is something else.
    """
    try:
        kind = json.loads(text)["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"the vocabulary cannot be read: {error!r}; publish the model again") from error
    return TextBytePairTokenizer.from_json(text) if kind == KIND else CharacterTokenizer.from_json(text)
