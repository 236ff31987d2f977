"""Batches for BERT: single sentences, and pairs of which the second follows the first half the time.

The other half it comes from another document, as in the paper: a shuffled neighbour would be ALBERT's task. Both kinds
are drawn alike, from places that follow a line, so that no second text betrays itself by how it begins.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.nlp.tokenizers.wordpiece import WordPieceTokenizer
from services.nlp.training.bert_data import Reading
from services.nlp.training.masking import SpecialIds, mask_tokens
from shared.training.seed import sample_rng

LINES = 2
"""Of each text of a pair, at most."""
UNASKED = -100
"""Target of what has no target."""


@dataclass(frozen=True)
class EncodedReading:
    """Sentences as ids, without special ones."""

    singles: list[list[int]]
    documents: list[list[list[int]]]

    @functools.cached_property
    def borders(self) -> list[tuple[int, int]]:
        """(document, sentence) of every sentence that follows another one."""
        return [(d, s) for d, document in enumerate(self.documents) for s in range(1, len(document))]


@dataclass(frozen=True)
class Masked:
    """Rows with gaps, as tensors."""

    tokens: Tensor
    """`[B, T]`."""
    segments: Tensor
    """`[B, T]`, 0 or 1."""
    targets: Tensor
    """`[B, T]`: the piece behind each gap, elsewhere UNASKED."""
    follows: Tensor
    """`[B]`: 1 if the second text follows, 0 if not, UNASKED where there is one text."""


def encode_reading(reading: Reading, tokenizer: WordPieceTokenizer) -> EncodedReading:
    """A reading as ids."""
    return EncodedReading(
        [tokenizer.encode(sentence) for sentence in reading.singles],
        [[tokenizer.encode(sentence) for sentence in document] for document in reading.documents],
    )


def rows_of(
    texts: Sequence[tuple[Sequence[int], Sequence[int]]], tokenizer: WordPieceTokenizer, context: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and segments `[B, T]`: `[CLS] a [SEP]`, or `[CLS] a [SEP] b [SEP]`; the longer text is cut to fit."""
    rows = [_row(list(first), list(second), tokenizer, context) for first, second in texts]
    longest = max(len(tokens) for tokens, _ in rows)
    tokens = np.full((len(rows), longest), tokenizer.pad, np.int64)
    segments = np.zeros((len(rows), longest), np.int64)
    for index, (ids, parts) in enumerate(rows):
        tokens[index, : len(ids)], segments[index, : len(ids)] = ids, parts
    return tokens, segments


def _row(
    first: list[int], second: list[int], tokenizer: WordPieceTokenizer, context: int
) -> tuple[list[int], list[int]]:
    while len(first) + len(second) + 2 + bool(second) > context:
        (first if len(first) >= len(second) else second).pop()
    begin = [tokenizer.cls, *first, tokenizer.sep]
    end = [*second, tokenizer.sep] if second else []
    return begin + end, [0] * len(begin) + [1] * len(end)


class Masker:
    """Turns texts into rows with gaps."""

    def __init__(self, tokenizer: WordPieceTokenizer, context: int) -> None:
        self.tokenizer, self.context = tokenizer, context
        self.ids = SpecialIds(tokenizer.mask, tokenizer.special, len(tokenizer))

    def singles(self, sentences: Sequence[Sequence[int]], rng: np.random.Generator) -> Masked:
        """Single sentences."""
        return self._mask([(sentence, ()) for sentence in sentences], [UNASKED] * len(sentences), rng)

    def pairs(self, reading: EncodedReading, chosen: Sequence[tuple[int, int]], rng: np.random.Generator) -> Masked:
        """A pair for each border: what stands before it, and behind it or, half the time, in another document."""
        texts: list[tuple[Sequence[int], Sequence[int]]] = []
        labels: list[int] = []
        for document, sentence in chosen:
            label = int(rng.random() < 0.5)
            other = (document, sentence)
            while not label and other[0] == document:
                other = reading.borders[int(rng.integers(len(reading.borders)))]
            before = reading.documents[document][max(0, sentence - LINES) : sentence]
            behind = reading.documents[other[0]][other[1] : other[1] + LINES]
            texts.append((list(chain(*before)), list(chain(*behind))))
            labels.append(label)
        return self._mask(texts, labels, rng)

    def _mask(
        self, texts: Sequence[tuple[Sequence[int], Sequence[int]]], labels: Sequence[int], rng: np.random.Generator
    ) -> Masked:
        tokens, segments = rows_of(texts, self.tokenizer, self.context)
        masked = mask_tokens(tokens, self.ids, rng)
        targets = np.where(masked.chosen, tokens, UNASKED)
        parts = (masked.tokens, segments, targets, np.array(labels, np.int64))
        return Masked(*(torch.from_numpy(part) for part in parts))


class MaskedBatches:
    """Batches of single sentences and of pairs, the same for the same (seed, epoch, step)."""

    def __init__(
        self, reading: EncodedReading, masker: Masker, singles: int, pairs: int, seed: int, steps: int
    ) -> None:
        self.reading, self.masker, self.sizes, self.seed = reading, masker, (singles, pairs), seed
        self.steps_per_epoch = steps

    def batch(self, epoch: int, step: int) -> tuple[list[Masked], Tensor]:
        """The parts of one step, and how many gaps they have."""
        rng = sample_rng(self.seed, epoch, step)
        singles, pairs = self.sizes
        parts: list[Masked] = []
        if singles and self.reading.singles:
            drawn = rng.choice(len(self.reading.singles), singles, replace=False)
            parts.append(self.masker.singles([self.reading.singles[index] for index in drawn], rng))
        if pairs:
            borders = self.reading.borders
            chosen = [borders[index] for index in rng.choice(len(borders), pairs, replace=False)]
            parts.append(self.masker.pairs(self.reading, chosen, rng))
        return parts, torch.stack([(part.targets != UNASKED).sum() for part in parts])
