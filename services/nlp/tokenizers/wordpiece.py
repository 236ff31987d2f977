"""WordPiece (Schuster & Nakajima 2012; Wu et al. 2016): a word is cut greedily into the longest pieces that are known.

A piece that goes on within a word begins with `##`. Unlike byte-pair encoding, encoding needs no order of merges, and
the trainer joins the two pieces that make the training text most probable, not those that are most frequent.
"""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise

from shared.errors import ConfigurationError

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL_PIECES = (PAD, UNK, CLS, SEP, MASK)
CONTINUED = "##"
LONGEST_WORD = 100
"""Longer words are unknown, as in BERT's own tokenizer."""
CACHED_WORDS = 10_000
MIN_PAIRS = 2
"""Two pieces that meet less often are never joined."""
Pair = tuple[str, str]


class WordPieceTokenizer:
    """Encodes words as ids of pieces.

    Args:
        pieces: by id; SPECIAL_PIECES are among them, anywhere.
    """

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = tuple(pieces)
        self._ids = {piece: index for index, piece in enumerate(self.pieces)}
        missing = [piece for piece in SPECIAL_PIECES if piece not in self._ids]
        if missing or len(self._ids) != len(self.pieces):
            raise ConfigurationError(
                f"a WordPiece vocabulary holds each piece once, {', '.join(SPECIAL_PIECES)} among them; "
                "publish the model again"
            )
        self.pad, self.unk, self.cls, self.sep, self.mask = (self._ids[piece] for piece in SPECIAL_PIECES)
        self._longest = max(map(len, self.pieces))
        self._split = lru_cache(maxsize=CACHED_WORDS)(self._split_word)

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def special(self) -> frozenset[int]:
        """Ids that mean no text."""
        return frozenset((self.pad, self.unk, self.cls, self.sep, self.mask))

    def encode(self, words: Iterable[str]) -> list[int]:
        """Ids of the pieces of each word; a word with a character that no piece holds is one `[UNK]`."""
        return [self._ids[piece] for word in words for piece in self.split(word)]

    def split(self, word: str) -> tuple[str, ...]:
        """The pieces of one word."""
        return self._split(word) if len(word) <= LONGEST_WORD else (UNK,)

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The words that pieces spell; special ids but `[UNK]` and `[MASK]` are left out."""
        words: list[str] = []
        for index in ids:
            piece = self.pieces[index]
            if piece.startswith(CONTINUED) and words:
                words[-1] += piece.removeprefix(CONTINUED)
            elif index not in (self.pad, self.cls, self.sep):
                words.append(piece)
        return words

    def _split_word(self, word: str) -> tuple[str, ...]:
        parts: list[str] = []
        begin = 0
        while begin < len(word):
            mark = CONTINUED if begin else ""
            for end in range(min(len(word), begin + self._longest), begin, -1):
                if mark + word[begin:end] in self._ids:
                    break
            else:
                return (UNK,)
            parts.append(mark + word[begin:end])
            begin = end
        return tuple(parts)

    def to_json(self) -> str:
        """The vocabulary as JSON."""
        return json.dumps({"kind": "wordpiece", "pieces": self.pieces}, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> WordPieceTokenizer:
        """Reads what `to_json` wrote.

        Raises:
            ConfigurationError: it is something else.
        """
        try:
            raw = json.loads(text)
            if raw["kind"] != "wordpiece":
                raise ValueError(f"kind {raw['kind']}")
            return cls(raw["pieces"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"the vocabulary cannot be read: {error!r}; publish the model again") from error


def train_wordpiece(words: Iterable[str], size: int, min_count: int = 1) -> WordPieceTokenizer:
    """Learns a vocabulary of at most `size` pieces, special ones included.

    Every character that occurs at least `min_count` times stays, as a beginning or continued as it was seen, so that
    the training words are spelled without loss. Then, again and again, two neighbours become one piece: those for
    which the likelihood of the text, its pieces drawn independently, rises most, which is to first order
    n(ab) log(n(ab) N / (n(a) n(b))). Ties go to the pair that is first in the order of Unicode.

    Args:
        words: every occurrence of every word.
        size: most pieces.
        min_count: rarer characters have no piece, and words that hold them do not train.
    """
    counts = Counter(words)
    characters = Counter[str]()
    for word, count in counts.items():
        for symbol in _symbols(word):
            characters[symbol] += count
    kept = {symbol for symbol, count in characters.items() if count >= min_count}
    pieces = dict.fromkeys([*SPECIAL_PIECES, *sorted(kept)])
    if len(pieces) > size:
        raise ConfigurationError(f"{len(pieces)} characters do not fit {size} pieces; ask for more, or raise min_count")
    table = _Pieces({word: count for word, count in counts.items() if kept.issuperset(_symbols(word))})
    while len(pieces) < size and (best := table.best()):
        pieces[table.join(best)] = None
    return WordPieceTokenizer(list(pieces))


class _Pieces:
    """How the training words are spelled so far, with the counts of pieces and of neighbours."""

    def __init__(self, counts: dict[str, int]) -> None:
        self.counts = counts
        self.spelled = {word: _symbols(word) for word in counts}
        self.single = Counter[str]()
        self.pairs = Counter[Pair]()
        self.where: defaultdict[Pair, set[str]] = defaultdict(set)
        self.frequent: list[tuple[int, Pair]] = []
        for word, count in counts.items():
            self._count(word, count)
        self._remember(self.pairs)

    def best(self) -> Pair | None:
        """The pair whose join gains most; None if none gains.

        A piece occurs at least as often as a pair it is in, so a pair that occurs n times gains at most n log(N / n):
        pairs are looked at from the most frequent on, until none can gain more than the best so far.
        """
        total = sum(self.single.values())
        best: tuple[float, Pair] = (0.0, ("", ""))
        seen: dict[Pair, int] = {}
        while self.frequent:
            entry = heapq.heappop(self.frequent)
            count, pair = -entry[0], entry[1]
            if self.pairs[pair] != count or pair in seen:
                continue  # counted anew since
            seen[pair] = count
            if count * math.log(total / count) < -best[0]:
                break
            gain = count * math.log(count * total / (self.single[pair[0]] * self.single[pair[1]]))
            if count >= MIN_PAIRS and gain > 0:
                best = min(best, (-gain, pair))
        for pair, count in seen.items():
            heapq.heappush(self.frequent, (-count, pair))
        return best[1] if best[0] else None

    def join(self, pair: Pair) -> str:
        """Spells all words with the pair as one piece, and returns it."""
        piece = pair[0] + pair[1].removeprefix(CONTINUED)
        changed: set[Pair] = set()
        for word in sorted(self.where.pop(pair)):
            count = self.counts[word]
            changed.update(pairwise(self.spelled[word]))
            self._count(word, -count)
            self.spelled[word] = _joined(self.spelled[word], pair, piece)
            self._count(word, count)
            changed.update(pairwise(self.spelled[word]))
        self._remember(changed)
        return piece

    def _remember(self, pairs: Iterable[Pair]) -> None:
        for pair in pairs:
            if count := self.pairs[pair]:
                heapq.heappush(self.frequent, (-count, pair))

    def _count(self, word: str, count: int) -> None:
        parts = self.spelled[word]
        for part in parts:
            self.single[part] += count
        for pair in pairwise(parts):
            self.pairs[pair] += count
            if self.pairs[pair] <= 0:
                del self.pairs[pair]
            if count > 0:
                self.where[pair].add(word)


def _joined(parts: list[str], pair: Pair, piece: str) -> list[str]:
    joined: list[str] = []
    at = 0
    while at < len(parts):
        both = tuple(parts[at : at + 2]) == pair
        joined.append(piece if both else parts[at])
        at += 2 if both else 1
    return joined


def _symbols(word: str) -> list[str]:
    return [word[:1], *(CONTINUED + character for character in word[1:])] if word else []
