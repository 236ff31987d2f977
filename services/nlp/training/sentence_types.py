"""Kinds of sentences: question, command or statement, told by how the Japanese translation ends.

The English sentence, its sign at the end taken away, is what a model sees; the label comes from the other language, so
no rule over English words made it. Of the translation corpus's train file: the part that BERT never saw tests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from services.nlp.training.bert_data import held_back_indices
from services.nlp.training.data import load_pairs

LABELS = ("statement", "question", "command")
TEST_EACH, VALIDATION_EACH = 250, 100
_QUESTION = re.compile(r"(か|かい)。$|？$")
_COMMAND = re.compile(r"(なさい|下さい|ください|てくれ|しろ|せよ|ごらん|給え|たまえ|[るうくすむ]な|てね|頂戴)[。！]$")
_SIGNS = frozenset({".", "?", "!", "''", "..."})


@dataclass(frozen=True)
class Labelled:
    """Sentences as words, each with the index of its label."""

    sentences: list[list[str]]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.sentences)

    def take(self, count: int, seed: int) -> Labelled:
        """So many, drawn at random."""
        order = np.random.default_rng(seed).permutation(len(self))[:count]
        return Labelled([self.sentences[i] for i in order], [self.labels[i] for i in order])


def label_of(japanese: list[str]) -> int:
    """Index in LABELS of a sentence with this translation."""
    written = "".join(japanese)
    if _QUESTION.search(written):
        return 1
    return 2 if _COMMAND.search(written) else 0


def without_sign(words: list[str]) -> list[str]:
    """The words without the signs at the end, which would give questions away."""
    end = len(words)
    while end and words[end - 1] in _SIGNS:
        end -= 1
    return words[:end]


def load_types() -> tuple[Labelled, Labelled, Labelled]:
    """What trains, validates and tests, each with as many of every label; no test sentence stands in another part."""
    pairs = load_pairs("train")
    held = set(held_back_indices())
    test = _balanced(sorted(held), TEST_EACH, skip=set())
    tested = {tuple(sentence) for sentence in test.sentences}
    others = [i for i in range(len(pairs)) if i not in held]
    pool = _balanced(others, None, skip=tested)
    order = np.random.default_rng(1).permutation(len(pool))
    border = VALIDATION_EACH * len(LABELS)
    parts = (order[border:], order[:border])
    train, validation = (Labelled([pool.sentences[i] for i in p], [pool.labels[i] for i in p]) for p in parts)
    return train, validation, test


def _balanced(indices: list[int], each: int | None, skip: set[tuple[str, ...]]) -> Labelled:
    pairs = load_pairs("train")
    groups: list[list[list[str]]] = [[] for _ in LABELS]
    for index in np.random.default_rng(0).permutation(indices):
        words = without_sign(pairs.english[index])
        if words and tuple(words) not in skip:
            groups[label_of(pairs.japanese[index])].append(words)
    count = min(map(len, groups)) if each is None else each
    return Labelled(
        [words for group in groups for words in group[:count]],
        [label for label, group in enumerate(groups) for _ in group[:count]],
    )
