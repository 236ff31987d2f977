"""Four tasks about plays, one for each of GPT-1's heads, made of tiny Shakespeare by rules that anyone can check.

- question: is a sentence, its last sign taken away, a question (classification)?
- next: does the second line follow the first in the play, or is it from elsewhere (entailment, in GPT-1's form)?
- same: are two lines, in either order, of one speech or of two (similarity)?
- choice: which of four lines follows (multiple choice)?

What trains is of the first nine tenths of the text, what tests of the last, which the language model never saw either.
Both answers are equally frequent, so that chance is .5, and .25 of four lines.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from services.nlp.tokenizers.characters import CharacterTokenizer
from services.nlp.training.models.gpt_heads import row_of

LEAST, MOST = 15, 50
"""Characters of a line or sentence that is used: two and three tokens more fit the context of 128."""
CHOICES = 4
Texts = tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """Its rows, each of one or two texts, and its answer."""

    rows: tuple[Texts, ...]
    label: int

    def encode(self, tokenizer: CharacterTokenizer) -> list[list[int]]:
        """The rows as ids."""
        return [row_of(*map(tokenizer.encode, texts)) for texts in self.rows]


@dataclass(frozen=True)
class HeadTask:
    """A task: which head it takes, how many outputs that has, and what makes an example of each answer."""

    head: str
    outputs: int
    chance: float
    make: Callable[[list[list[str]], np.random.Generator], list[Example]]


def speeches(text: str) -> list[list[str]]:
    """The lines of each speech, without the speaker's name."""
    blocks = [block.split("\n") for block in text.split("\n\n")]
    return [block[1:] for block in blocks if block[0].endswith(":") and len(block) > 1]


def make_examples(task: str, text: str, count: int, seed: int) -> list[Example]:
    """`count` examples of a text, both answers in turn; the same for the same seed."""
    return TASKS[task].make(speeches(text), np.random.default_rng(seed))[:count]


def _usable(line: str) -> bool:
    return LEAST <= len(line) <= MOST


def _questions(spoken: list[list[str]], rng: np.random.Generator) -> list[Example]:
    sentences = {sentence.strip() for lines in spoken for sentence in re.findall(r"[^.?!]+[.?!]", " ".join(lines))}
    usable = sorted(filter(_usable, sentences))
    groups = [[one for one in usable if (one[-1] == "?") == asked] for asked in (False, True)]
    return _in_turns([[Example(((one[:-1],),), label) for one in group] for label, group in enumerate(groups)], rng)


def _following(spoken: list[list[str]]) -> list[tuple[str, str]]:
    pairs = [pair for lines in spoken for pair in itertools.pairwise(lines)]
    return [pair for pair in pairs if _usable(pair[0]) and _usable(pair[1])]


def _next(spoken: list[list[str]], rng: np.random.Generator) -> list[Example]:
    pairs = _following(spoken)
    others = [pairs[index][1] for index in rng.permutation(len(pairs))]
    follows = [Example((pair,), 1) for pair in pairs]
    random = [
        Example(((one, other),), 0) for (one, follower), other in zip(pairs, others, strict=True) if other != follower
    ]
    return _in_turns([random, follows], rng)


def _same(spoken: list[list[str]], rng: np.random.Generator) -> list[Example]:
    usable = [[line for line in lines if _usable(line)] for lines in spoken]
    several = [lines for lines in usable if len(lines) > 1]
    together, apart = [], []
    for lines in several:
        one, other = (lines[index] for index in rng.permutation(len(lines))[:2])
        stranger = several[int(rng.integers(len(several)))]
        together.append(_both_orders(one, other, 1))
        if stranger is not lines:
            apart.append(_both_orders(one, stranger[int(rng.integers(len(stranger)))], 0))
    return _in_turns([apart, together], rng)


def _both_orders(one: str, other: str, label: int) -> Example:
    return Example(((one, other), (other, one)), label)


def _choice(spoken: list[list[str]], rng: np.random.Generator) -> list[Example]:
    pairs = _following(spoken)
    examples = []
    for index in rng.permutation(len(pairs)):
        line, right = pairs[index]
        answers = [pairs[int(other)][1] for other in rng.integers(0, len(pairs), CHOICES - 1)]
        if right in answers:
            continue
        label = int(rng.integers(CHOICES))
        answers.insert(label, right)
        examples.append(Example(tuple((line, answer) for answer in answers), label))
    return examples


def _in_turns(groups: list[list[Example]], rng: np.random.Generator) -> list[Example]:
    """Equally many of each group, shuffled inside, one after the other."""
    shuffled = [[group[index] for index in rng.permutation(len(group))] for group in groups]
    return [example for examples in zip(*shuffled, strict=False) for example in examples]


TASKS: Mapping[str, HeadTask] = {
    "question": HeadTask("classification", 2, 0.5, _questions),
    "next": HeadTask("entailment", 2, 0.5, _next),
    "same": HeadTask("similarity", 2, 0.5, _same),
    "choice": HeadTask("multiple choice", 1, 1 / CHOICES, _choice),
}
