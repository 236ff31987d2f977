"""Beam search over log-probabilities (Graves 2012, Wu et al. 2016), one step at a time; numpy only.

A search keeps `beam` running hypotheses, each a row of the decoder's batch. After every step it is told the rows'
next-token log-probabilities and says which rows go on with which tokens. With `beam` 1 it is greedy search.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from services.nlp.tokenizers.special import BOS, EOS, PAD, UNK

Floats = npt.NDArray[np.float32]
NEVER = (PAD, BOS, UNK)
"""Ids that are no part of a translation."""


@dataclass(frozen=True)
class SearchSettings:
    """How to search.

    Attributes:
        beam: running hypotheses, 1 or more.
        max_tokens: longest hypothesis, the end counted.
        length_penalty: exponent a of ((5 + length) / 6)^a, the divisor of log-probabilities (Wu et al. 2016, equation
            14); the length counts the end.
    """

    beam: int = 4
    max_tokens: int = 60
    length_penalty: float = 0.6

    def normalised(self, log_probability: float, length: int) -> float:
        """The score by which hypotheses are compared."""
        return log_probability / float(((5 + length) / 6) ** self.length_penalty)


@dataclass(frozen=True)
class Found:
    """A hypothesis: its tokens without the end, the weights over the source `[tokens (+1), S]` if they were kept."""

    tokens: list[int]
    log_probability: float
    score: float
    finished: bool
    attention: list[Floats] = field(default_factory=list)


@dataclass(frozen=True)
class Next:
    """Which rows of the last step go on (`parents`, by their place in the search) with which tokens."""

    parents: list[int]
    tokens: list[int]


class BeamSearch:
    """The search for one sentence; begins with one row that has read BOS.

    Args:
        settings: how to search.
        keeps_attention: whether `advance` is given the rows' attention, to be kept with the hypotheses.
    """

    def __init__(self, settings: SearchSettings, *, keeps_attention: bool = False) -> None:
        self.settings = settings
        self.keeps_attention = keeps_attention
        self._running: list[tuple[list[int], float, list[Floats]]] = [([], 0.0, [])]
        self._pool: list[Found] = []

    @property
    def rows(self) -> int:
        """Number of running hypotheses."""
        return len(self._running)

    def advance(self, log_probabilities: Floats, attention: Floats | None = None) -> Next | None:
        """Takes a step.

        Args:
            log_probabilities: `[rows, V]` of the token that follows each running hypothesis.
            attention: `[rows, S]`, if it is kept.

        Returns:
            What runs next; None when the search is over.
        """
        beam = self.settings.beam
        rows, tokens, totals = self._candidates(log_probabilities, 2 * beam)
        followers: list[tuple[int, int, float]] = []
        for rank, (row, token, total) in enumerate(zip(rows, tokens, totals, strict=True)):
            if token == EOS:
                if rank < beam:  # what ends must be among the best, or short ends would crowd out longer ones
                    self._finish(row, total, attention)
            elif len(followers) < beam:
                followers.append((row, token, total))
        length = len(self._running[0][0]) + 1
        if self._is_over(followers, length):
            return None
        self._running = [self._follow(*follower, attention) for follower in followers]
        if length == self.settings.max_tokens:
            for row, (_, total, _) in enumerate(list(self._running)):
                self._finish(row, total, None, finished=False)
            return None
        return Next([row for row, _, _ in followers], [token for _, token, _ in followers])

    def best(self, count: int) -> list[Found]:
        """The best hypotheses, those that ended first, by their scores."""
        return sorted(self._pool, key=lambda found: (not found.finished, -found.score))[:count]

    def _candidates(self, log_probabilities: Floats, count: int) -> tuple[list[int], list[int], list[float]]:
        totals = log_probabilities + np.array([total for _, total, _ in self._running], np.float32)[:, None]
        totals[:, NEVER] = -np.inf
        width = totals.shape[1]
        flat = totals.ravel()
        count = min(count, flat.size)
        top = np.argpartition(flat, -count)[-count:] if count < flat.size else np.arange(flat.size)
        top = top[np.lexsort((top, -flat[top]))]
        top = top[np.isfinite(flat[top])]
        return (top // width).tolist(), (top % width).tolist(), flat[top].tolist()

    def _follow(
        self, row: int, token: int, total: float, attention: Floats | None
    ) -> tuple[list[int], float, list[Floats]]:
        tokens, _, seen = self._running[row]
        return (
            [*tokens, token],
            total,
            [*seen, attention[row]] if self.keeps_attention and attention is not None else [],
        )

    def _finish(self, row: int, total: float, attention: Floats | None, *, finished: bool = True) -> None:
        tokens, _, seen = self._running[row]
        if self.keeps_attention and attention is not None:
            seen = [*seen, attention[row]]
        score = self.settings.normalised(total, len(tokens) + finished)
        self._pool.append(Found(tokens, total, score, finished, seen))

    def _is_over(self, followers: list[tuple[int, int, float]], length: int) -> bool:
        beam = self.settings.beam
        if not followers:
            return True
        if len(self._pool) < beam:
            return False
        if beam == 1:
            return True
        worst_kept = sorted((found.score for found in self._pool), reverse=True)[beam - 1]
        # log-probabilities only fall, so this is the most that any of them can still reach
        longest = self.settings.max_tokens + 1
        attainable = max(self.settings.normalised(total, longest) for _, _, total in followers)
        return attainable <= worst_kept
