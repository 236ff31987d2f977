"""BLEU (Papineni et al. 2002) of a corpus with one reference a sentence, in percent."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from services.nlp.tokenizers.special import SPECIAL_PIECES, UNK

ORDER = 4


@dataclass(frozen=True)
class Bleu:
    """BLEU and what it is made of; `score` and `precisions` in percent."""

    score: float
    precisions: tuple[float, ...]
    brevity_penalty: float
    candidate_words: int
    reference_words: int


def corpus_bleu(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[str]], *, unknown_matches: bool = False
) -> Bleu:
    """BLEU of `candidates` against `references`: BP · exp(mean over n of log p_n), n = 1 to 4, without smoothing.

    An unknown word never matches, not even another unknown word: it says nothing. With `unknown_matches` it does, as
    in the report, which compared ids.
    """
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates for {len(references)} references")
    matches, totals = [0] * ORDER, [0] * ORDER
    for candidate, reference in zip(candidates, references, strict=True):
        for n in range(1, ORDER + 1):
            own, other = _ngrams(candidate, n), _ngrams(reference, n)
            matches[n - 1] += sum(
                min(count, other[gram])
                for gram, count in own.items()
                if unknown_matches or SPECIAL_PIECES[UNK] not in gram
            )
            totals[n - 1] += sum(own.values())
    length, wanted = sum(map(len, candidates)), sum(map(len, references))
    penalty = 1.0 if length > wanted else math.exp(1 - wanted / length) if length else 0.0
    precisions = tuple(100 * match / total if total else 0.0 for match, total in zip(matches, totals, strict=True))
    score = penalty * math.exp(sum(map(math.log, precisions)) / ORDER) if all(precisions) else 0.0
    return Bleu(score, precisions, penalty, length, wanted)


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
