"""Byte-pair encoding (Sennrich et al. 2016) of words: frequent words stay whole, rare ones are spelled by their parts.

A word begins with `▁` (U+2581), which no text of ours contains, so joining the pieces and turning `▁` into a space
gives the words back. A merge never crosses a word.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

from services.nlp.tokenizers.special import SPECIAL_PIECES, UNK
from shared.errors import ConfigurationError

WORD_BEGIN = "▁"
LONGEST_WORD = 64
"""Longer words are spelled in parts of this many characters: the work grows with the square. The corpus has 17."""
CACHED_WORDS = 10_000
Pair = tuple[str, str]


class BytePairTokenizer:
    """Encodes words as ids of pieces.

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
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._split = lru_cache(maxsize=CACHED_WORDS)(self._split_word)

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, words: Iterable[str]) -> list[int]:
        """Ids of the pieces of each word; a character never seen is `UNK`."""
        return [self._ids.get(piece, UNK) for word in words for piece in self.split(word)]

    def split(self, word: str) -> tuple[str, ...]:
        """The pieces of one word, unknown characters included."""
        if len(word) <= LONGEST_WORD:
            return self._split(word)
        symbols = _symbols(word)
        parts = (symbols[start : start + LONGEST_WORD] for start in range(0, len(symbols), LONGEST_WORD))
        return tuple(piece for part in parts for piece in apply_merges(part, self._ranks))

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The words that pieces spell; special ids but `UNK` are left out."""
        text = "".join(
            self.pieces[index] if index >= len(SPECIAL_PIECES) else SPECIAL_PIECES[UNK] for index in ids if index >= UNK
        )
        return [word for word in text.split(WORD_BEGIN) if word]

    def _split_word(self, word: str) -> tuple[str, ...]:
        return apply_merges(_symbols(word), self._ranks)

    def to_json(self) -> str:
        """The vocabulary as JSON."""
        return json.dumps({"kind": "bpe", "pieces": self.pieces, "merges": self.merges}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> BytePairTokenizer:
        """Reads what `to_json` wrote.

        Raises:
            ConfigurationError: it is something else.
        """
        try:
            raw = json.loads(text)
            return cls(raw["pieces"], [(left, right) for left, right in raw["merges"]])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"the vocabulary cannot be read: {error!r}; publish the model again") from error


def apply_merges(parts: list[str], ranks: Mapping[Pair, int]) -> tuple[str, ...]:
    """Joins neighbours, the pair that was learnt first at each time, until no two are a pair."""
    while len(parts) > 1:
        ranked = [(ranks.get(pair, len(ranks)), at) for at, pair in enumerate(pairwise(parts))]
        rank, at = min(ranked)
        if rank == len(ranks):
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts)


def train_bpe(words: Iterable[str], merges: int, min_count: int = 2) -> BytePairTokenizer:
    """Learns merges from words: again and again the most frequent pair of neighbours becomes one piece.

    Args:
        words: every occurrence of every word.
        merges: how many; fewer if no pair occurs twice.
        min_count: characters that occur less often have no id of their own.

    Ties go to the pair that is first in the order of Unicode, so that the result does not depend on hashing.
    """
    counts = Counter(words)
    spelled = {word: _symbols(word) for word in counts}
    characters = Counter[str]()
    for word, count in counts.items():
        for symbol in spelled[word]:
            characters[symbol] += count
    learnt = learn_merges(counts, spelled, merges)
    kept = sorted(symbol for symbol, count in characters.items() if count >= min_count)
    pieces = [*SPECIAL_PIECES, *kept]
    pieces += dict.fromkeys(left + right for left, right in learnt)
    return BytePairTokenizer(pieces, learnt)


def learn_merges(counts: Counter[str], spelled: dict[str, list[str]], merges: int) -> list[Pair]:
    """The merges, in order; `spelled` holds the parts of each word and is changed in place."""
    pairs = Counter[Pair]()
    where: defaultdict[Pair, set[str]] = defaultdict(set)
    for word, parts in spelled.items():
        _count_pairs(parts, counts[word], word, pairs, where)
    learnt: list[Pair] = []
    while len(learnt) < merges:
        best, count = min(pairs.items(), key=lambda entry: (-entry[1], entry[0]), default=(("", ""), 0))
        if count < 2:
            break
        learnt.append(best)
        for word in sorted(where.pop(best)):
            _count_pairs(spelled[word], -counts[word], word, pairs, where)
            spelled[word] = _merged(spelled[word], best)
            _count_pairs(spelled[word], counts[word], word, pairs, where)
        pairs.pop(best, None)
    return learnt


def _count_pairs(
    parts: list[str], count: int, word: str, pairs: Counter[Pair], where: defaultdict[Pair, set[str]]
) -> None:
    for pair in pairwise(parts):
        pairs[pair] += count
        if pairs[pair] <= 0:
            del pairs[pair]
        if count > 0:
            where[pair].add(word)


def _merged(parts: list[str], pair: Pair) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def _symbols(word: str) -> list[str]:
    if not word:
        return []
    return [WORD_BEGIN + word[0], *word[1:]]
