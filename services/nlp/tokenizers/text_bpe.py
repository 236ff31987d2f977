"""Byte-pair encoding of running text: what `bpe.py` does with words, but spaces and line ends are kept.

Text is cut into chunks (a word or signs with the space before it, or blank space), as GPT-2 does (Radford et al. 2019),
and no merge crosses a chunk. Joining the pieces gives the text back, but for characters that the vocabulary lacks.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

from services.nlp.tokenizers.bpe import CACHED_WORDS, LONGEST_WORD, Pair, apply_merges, learn_merges
from services.nlp.tokenizers.special import SPECIAL_PIECES, UNK
from shared.errors import ConfigurationError

KIND = "text-bpe"
_CHUNK = re.compile(r" ?\w+| ?[^\w\s]+|\s+?(?= ?\S)|\s+")


class TextBytePairTokenizer:
    """Encodes text as ids of pieces.

    Args:
        pieces: by id; the first four are SPECIAL_PIECES.
        merges: pairs in the order in which they were learnt.
    """

    def __init__(self, pieces: Sequence[str], merges: Sequence[Pair]) -> None:
        if tuple(pieces[: len(SPECIAL_PIECES)]) != SPECIAL_PIECES:
            raise ConfigurationError(
                f"a vocabulary must begin with {', '.join(SPECIAL_PIECES)}; export the model again"
            )
        self.pieces = tuple(pieces)
        self.merges = tuple(merges)
        self._ids = {piece: index for index, piece in enumerate(self.pieces)}
        ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._join = lru_cache(maxsize=CACHED_WORDS)(lambda chunk: apply_merges(list(chunk), ranks))

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Ids of the pieces; a character never seen is `UNK`."""
        return [self._ids.get(piece, UNK) for piece in self.split(text)]

    def split(self, text: str) -> list[str]:
        """The pieces, unknown characters included: joined they are the text."""
        return [piece for chunk in chunks(text) for piece in self._join(chunk)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ids are left out."""
        return "".join(self.pieces[index] for index in ids if index >= len(SPECIAL_PIECES))

    def to_json(self) -> str:
        """The vocabulary as JSON."""
        return json.dumps({"kind": KIND, "pieces": self.pieces, "merges": self.merges}, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TextBytePairTokenizer:
        """Reads what `to_json` wrote.

        Raises:
            ConfigurationError: it is something else.
        """
        try:
            raw = json.loads(text)
            if raw["kind"] != KIND:
                raise ValueError(f"kind {raw['kind']}")
            return cls(raw["pieces"], [(left, right) for left, right in raw["merges"]])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"the vocabulary cannot be read: {error!r}; publish the model again") from error


def chunks(text: str) -> list[str]:
    """The parts that no merge crosses; joined they are the text. Long ones are cut: the work grows with the square."""
    found = _CHUNK.findall(text)
    return [chunk[at : at + LONGEST_WORD] for chunk in found for at in range(0, len(chunk), LONGEST_WORD)]


def train_text_bpe(text: str, merges: int, min_count: int = 1) -> TextBytePairTokenizer:
    """Learns merges from text, ties as in `train_bpe`.

    Args:
        text: to learn from.
        merges: how many; fewer if no pair occurs twice.
        min_count: characters that occur less often have no id of their own, nor has a piece that holds one.
    """
    counts = Counter(chunks(text))
    kept = {character for character, count in Counter(text).items() if count >= min_count}
    learnt = learn_merges(counts, {chunk: list(chunk) for chunk in counts}, merges)
    learnt = [pair for pair in learnt if kept.issuperset("".join(pair))]
    pieces = [*SPECIAL_PIECES, *sorted(kept), *dict.fromkeys(left + right for left, right in learnt)]
    return TextBytePairTokenizer(pieces, learnt)
