"""Choosing the next token from log-probabilities, and cutting text at stop strings; numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.nlp.serving.search import Floats
from services.nlp.tokenizers.special import SPECIAL_PIECES

FIRST_PIECE = len(SPECIAL_PIECES)
"""Ids below are no text and never chosen."""


@dataclass(frozen=True)
class SamplingSettings:
    """How to choose.

    Attributes:
        temperature: divides the log-probabilities; 0 means always the most probable token.
        top_k: only so many of the most probable tokens may be chosen; 0 means all.
        top_p: only the fewest most probable tokens that together have this probability (Holtzman et al. 2020).
        seed: of the draws; the same seed and settings give the same text.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class Sampler:
    """Draws tokens."""

    def __init__(self, settings: SamplingSettings) -> None:
        self.settings = settings
        self._random = np.random.default_rng(settings.seed)

    def choose(self, log_probabilities: Floats) -> int:
        """The next token, given the model's log-probabilities `[V]`."""
        allowed = log_probabilities[FIRST_PIECE:]
        if self.settings.temperature == 0:
            return FIRST_PIECE + int(allowed.argmax())
        order = np.argsort(-allowed, kind="stable")
        weights = self._weights(allowed[order].astype(np.float64) / self.settings.temperature)
        index = int(np.searchsorted(np.cumsum(weights), self._random.random() * weights.sum(), side="right"))
        return FIRST_PIECE + int(order[min(index, len(weights) - 1)])

    def _weights(self, descending: np.ndarray) -> np.ndarray:
        """Probabilities of those that may be chosen, most probable first."""
        if self.settings.top_k:
            descending = descending[: self.settings.top_k]
        weights: np.ndarray = np.exp(descending - descending[0])
        if self.settings.top_p < 1:
            shares = np.cumsum(weights) / weights.sum()
            weights = weights[: int(np.searchsorted(shares, self.settings.top_p, side="left")) + 1]
        return weights


class StopStrings:
    """Passes text on as it comes, up to the first stop string; what might begin one is held back until it is known.

    Args:
        stops: none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Takes more text; returns what may be passed on, and whether a stop string was met."""
        self._held += text
        at = min((place for stop in self._stops if (place := self._held.find(stop)) >= 0), default=-1)
        if at >= 0:
            passed, self._held = self._held[:at], ""
            return passed, True
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        passed, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return passed, False

    def flush(self) -> str:
        """What is still held back, when no more text comes."""
        passed, self._held = self._held, ""
        return passed

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of what is held that begins the stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)
