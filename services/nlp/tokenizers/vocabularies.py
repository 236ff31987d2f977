"""The two vocabularies of a translator, as one file beside its model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from services.nlp.tokenizers.bpe import BytePairTokenizer
from services.nlp.tokenizers.words import WordTokenizer
from shared.errors import ConfigurationError

Tokenizer = BytePairTokenizer | WordTokenizer


@dataclass(frozen=True)
class Vocabularies:
    """One tokenizer for each language."""

    english: Tokenizer
    japanese: Tokenizer

    def to_json(self) -> str:
        """Both as one JSON text."""
        parts = {"english": json.loads(self.english.to_json()), "japanese": json.loads(self.japanese.to_json())}
        return json.dumps(parts, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Vocabularies:
        """Reads what `to_json` wrote.

        Raises:
            ConfigurationError: it is something else.
        """
        try:
            raw = json.loads(text)
            return cls(_tokenizer(raw["english"]), _tokenizer(raw["japanese"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"the vocabularies cannot be read: {error!r}; publish the model again") from error


def _tokenizer(raw: Any) -> Tokenizer:
    kinds: dict[str, type[Tokenizer]] = {"bpe": BytePairTokenizer, "words": WordTokenizer}
    return kinds[raw["kind"]].from_json(json.dumps(raw))
