"""The translation corpus: 50,000 + 500 short sentences, English and Japanese, their words apart.

`dev` is the report's test. Two divisions of the 50,000: the report's own (40,000 to train, 10,000 to validate, drawn as
scikit-learn's train_test_split draws with random_state 42), and one that trains on all but 500.
"""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from services.nlp.tokenizers.special import BOS, EOS, PAD
from services.nlp.tokenizers.vocabularies import Vocabularies
from shared.data.locate import locate
from shared.training.seed import epoch_order, sample_rng

Division = Literal["report", "most"]
HELD_BACK = {"report": 10_000, "most": 500}


@dataclass(frozen=True)
class Pairs:
    """Sentences as words; `english[i]` means `japanese[i]`."""

    english: list[list[str]]
    japanese: list[list[str]]

    def __len__(self) -> int:
        return len(self.english)

    def take(self, indices: Sequence[int]) -> Pairs:
        """The pairs of these indices, in their order."""
        return Pairs([self.english[i] for i in indices], [self.japanese[i] for i in indices])


@functools.lru_cache
def load_pairs(part: Literal["train", "dev"]) -> Pairs:
    """All pairs of a file of the corpus."""
    with zipfile.ZipFile(locate("enja")) as archive:
        english, japanese = (
            [line.split() for line in archive.read(f"{part}.{language}").decode().splitlines()]
            for language in ("en", "ja")
        )
    return Pairs(english, japanese)


def divide(division: Division) -> tuple[Pairs, Pairs]:
    """The training and the validation part of the train file."""
    pairs = load_pairs("train")
    order = np.random.RandomState(42).permutation(len(pairs))  # as train_test_split draws: the test part comes first
    held = HELD_BACK[division]
    return pairs.take(order[held:].tolist()), pairs.take(order[:held].tolist())


@dataclass(frozen=True)
class Encoded:
    """Sentences as ids, each ending with EOS."""

    source: list[list[int]]
    target: list[list[int]]

    def __len__(self) -> int:
        return len(self.source)


def encode_pairs(pairs: Pairs, vocabularies: Vocabularies) -> Encoded:
    """Pairs as ids."""
    return Encoded(
        [[*vocabularies.english.encode(words), EOS] for words in pairs.english],
        [[*vocabularies.japanese.encode(words), EOS] for words in pairs.japanese],
    )


def padded(sequences: Sequence[Sequence[int]]) -> Tensor:
    """`[B, longest]` int64, PAD after each end."""
    batch = torch.full((len(sequences), max(map(len, sequences))), PAD)
    for row, sequence in enumerate(sequences):
        batch[row, : len(sequence)] = torch.tensor(sequence)
    return batch


def shifted(target: Tensor) -> Tensor:
    """The decoder's input for `[B, T]` targets: BOS, then all but the last."""
    return torch.cat((torch.full_like(target[:, :1], BOS), target[:, :-1]), dim=1)


class PairBatches:
    """Batches of pairs of like length: sorted inside pools of 50 batches, the batches in random order.

    Args:
        pairs: ids.
        batch: pairs in a step.
        seed: of the order.
        teacher_forcing: share of the steps in which a decoder reads the target; below 1 the inputs say which.
    """

    POOL = 50

    def __init__(self, pairs: Encoded, batch: int, seed: int, teacher_forcing: float = 1.0) -> None:
        self.pairs, self.size, self.seed, self.teacher_forcing = pairs, batch, seed, teacher_forcing
        self.steps_per_epoch = (len(pairs) + batch - 1) // batch
        self._plan = functools.lru_cache(maxsize=1)(self._make_plan)

    def batch(self, epoch: int, step: int) -> tuple[tuple[Tensor, Tensor] | tuple[Tensor, Tensor, bool], Tensor]:
        """((source `[B, S]`, decoder input `[B, T]`, whether it is read), targets `[B, T]`) of one step."""
        chosen = self._plan(epoch)[step]
        target = padded([self.pairs.target[i] for i in chosen])
        source, read = padded([self.pairs.source[i] for i in chosen]), shifted(target)
        if self.teacher_forcing == 1:
            return (source, read), target
        return (source, read, self.is_forced(epoch, step)), target

    def is_forced(self, epoch: int, step: int) -> bool:
        """Whether the decoder reads the target in this step (teacher forcing), or what it said itself."""
        return bool(sample_rng(self.seed, epoch, 2 + step).random() < self.teacher_forcing)

    def _make_plan(self, epoch: int) -> list[list[int]]:
        order = epoch_order(self.seed, epoch, len(self.pairs)).tolist()
        pool = self.POOL * self.size
        batches: list[list[int]] = []
        for start in range(0, len(order), pool):
            members = sorted(order[start : start + pool], key=self._length)
            batches += [members[at : at + self.size] for at in range(0, len(members), self.size)]
        shuffled = sample_rng(self.seed, epoch, 1).permutation(len(batches))
        return [batches[index] for index in shuffled]

    def _length(self, index: int) -> tuple[int, int]:
        return len(self.pairs.target[index]), len(self.pairs.source[index])
