"""What BERT reads: single sentences, and documents whose sentences follow each other.

`english`: the English side of the translation corpus, single sentences without a context, and tiny Shakespeare, where a
speech is a document and a line a sentence. `soseki`: the novels, where a paragraph is a document.

Held back: 5,000 sentences of the corpus's train file (its dev file is never read), the last tenth of Shakespeare, and
of Soseki the end of each novel.
"""

from __future__ import annotations

import functools
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from services.nlp.preprocess import split_english
from services.nlp.training.data import load_pairs
from services.nlp.training.texts import TEXTS, TRAIN_SHARE, held_back_text, training_text
from shared.data.locate import locate

CorpusName = Literal["english", "soseki"]
Sentence = list[str]
Document = list[Sentence]
HELD_BACK = 5000
"""Sentences of the translation corpus's train file that BERT never sees."""
_SENTENCE = re.compile(r"[^。！？]+[。！？]?(?: 」)?")


@dataclass(frozen=True)
class Reading:
    """Sentences as words."""

    singles: list[Sentence]
    documents: list[Document]
    """Of two sentences or more."""

    def words(self) -> list[str]:
        """All words, one after the other."""
        sentences = [*self.singles, *(sentence for document in self.documents for sentence in document)]
        return [word for sentence in sentences for word in sentence]


def held_back_indices() -> list[int]:
    """Those of the train file's pairs that no BERT sees, in random order."""
    order = np.random.RandomState(42).permutation(len(load_pairs("train").english))
    return [int(index) for index in order[:HELD_BACK]]


@functools.lru_cache
def load_reading(corpus: CorpusName) -> tuple[Reading, Reading]:
    """What trains and what is held back; no single sentence stands in both."""
    return _english() if corpus == "english" else _soseki()


def _english() -> tuple[Reading, Reading]:
    sentences = load_pairs("train").english
    held = held_back_indices()
    away = {tuple(sentences[index]) for index in held}
    train = [sentence for sentence in sentences if tuple(sentence) not in away]
    return (
        Reading(train, speeches(training_text("shakespeare"))),
        Reading([sentences[index] for index in held], speeches(held_back_text("shakespeare"))),
    )


def speeches(text: str) -> list[Document]:
    """The speeches of a play that have two lines or more, without the names of those who speak."""
    parts = [[split_english(line) for line in part.strip().split("\n")[1:]] for part in text.split("\n\n")]
    return _documents(parts)


def _soseki() -> tuple[Reading, Reading]:
    train, held = Reading([], []), Reading([], [])
    with zipfile.ZipFile(locate("soseki")) as archive:
        members = {member.rsplit("/", 1)[-1]: member for member in archive.namelist()}
        for file in TEXTS["soseki"].files:
            documents = paragraphs(archive.read(members[file]).decode())
            border = int(len(documents) * TRAIN_SHARE)
            train.documents.extend(documents[:border])
            held.documents.extend(documents[border:])
    return train, held


def paragraphs(text: str) -> list[Document]:
    """The paragraphs of a novel, its words apart, that have two sentences or more."""
    return _documents([[found.split() for found in _SENTENCE.findall(part)] for part in text.split("\r")])


def _documents(parts: Sequence[Sequence[Sentence]]) -> list[Document]:
    filled = [[sentence for sentence in part if sentence] for part in parts]
    return [document for document in filled if len(document) > 1]
