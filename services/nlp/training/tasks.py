"""Tasks that a small language model learns from made-up text, with a part that training never sees.

A row is a line of characters; only some of them, the answers, are to be predicted. Greedy search writes an answer
exactly if the most probable character is right at each of its places given the right ones before, so one run over
whole rows measures it.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.nlp.tokenizers.characters import CharacterTokenizer
from services.nlp.tokenizers.special import PAD, SPECIAL_PIECES
from shared.training.seed import sample_rng

Ints = NDArray[np.int64]
Predict = Callable[[Ints], Ints]
"""Tokens `[B, T]` → the most probable token after each `[B, T]`."""
SPLIT_SEED = 0
"""The division into training and held-back parts is the same for every seed of training."""


@dataclass(frozen=True)
class Rows:
    """Lines: `tokens` `[B, T]`, and `targets` `[B, T]`, what follows each, PAD where it is not asked for."""

    tokens: Ints
    targets: Ints


class Task(ABC):
    """A task: its characters, rows to learn from, and rows that are held back."""

    title: str
    description: str
    """For the model's card."""
    characters: str
    context: int
    """Length of the longest row."""
    measure: str
    """The measure of shared/measures.py that `evaluate` returns first."""
    least: float
    """What a model must reach to be published."""
    serving: ClassVar[Mapping[str, Any]]
    """What the server should know: see ModelHabits in serving/generator.py."""

    @property
    def tokenizer(self) -> CharacterTokenizer:
        """The vocabulary."""
        return CharacterTokenizer([*SPECIAL_PIECES, *sorted(self.characters)])

    @abstractmethod
    def draw(self, rng: np.random.Generator, count: int) -> Rows:
        """Random rows of the training part."""

    @abstractmethod
    def held_back(self) -> Rows:
        """The rows that are held back."""

    @abstractmethod
    def measures(self, right: NDArray[np.bool_], asked: NDArray[np.bool_]) -> dict[str, float]:
        """From what was predicted right, and what was asked, each `[N, T]` of the rows that are held back."""

    @abstractmethod
    def baselines(self) -> dict[str, float]:
        """The measure without learning."""

    def evaluate(self, predict: Predict, batch: int = 512) -> dict[str, float]:
        """The measures of a model on the rows that are held back."""
        rows = self.held_back()
        parts = [predict(rows.tokens[at : at + batch]) for at in range(0, len(rows.tokens), batch)]
        asked = rows.targets != PAD
        return self.measures((np.concatenate(parts) == rows.targets) & asked, asked)


class Addition(Task):
    """Sums of numbers from 0 to 99 as minGPT's adder learns them: `12+34=64` and a line feed, the sum from its end,
    since a carry is known only from the digits behind it. Held back is a fifth of the pairs, in both orders."""

    title = "addition of numbers up to 99"
    description = "Adds two numbers up to 99, digit by digit from the end: `12+34=` goes on with `46`."
    characters = "0123456789+=\n"
    context = 10
    measure = "exact_match"
    least = 0.99
    serving: ClassVar = {
        "stop": "\n",
        "reversed": True,
        "temperature": 0.0,
        "pattern": r"[0-9]{1,2}\+[0-9]{1,2}=",
        "example": "12+34=",
    }

    def __init__(self) -> None:
        pairs = list(itertools.combinations_with_replacement(range(100), 2))
        order = np.random.default_rng(SPLIT_SEED).permutation(len(pairs))
        cut = len(pairs) // 5
        self.held = [ordered for index in order[:cut] for ordered in _both_orders(pairs[index])]
        self.training = [ordered for index in order[cut:] for ordered in _both_orders(pairs[index])]
        self._held, self._training = self.rows(self.held), self.rows(self.training)

    def rows(self, pairs: Sequence[tuple[int, int]]) -> Rows:
        """Lines of sums, filled up with PAD; the answers are all that follows `=`."""
        encode = self.tokenizer.encode
        lines = [(encode(f"{one}+{other}="), encode(f"{str(one + other)[::-1]}\n")) for one, other in pairs]
        ids = np.full((len(lines), self.context), PAD, np.int64)
        asked = np.zeros_like(ids, bool)
        for row, (question, answer) in enumerate(lines):
            ids[row, : len(question) + len(answer)] = question + answer
            asked[row, len(question) : len(question) + len(answer)] = True
        return _shifted(ids, asked)

    def draw(self, rng: np.random.Generator, count: int) -> Rows:
        """See Task."""
        chosen = rng.integers(0, len(self.training), count)
        return Rows(self._training.tokens[chosen], self._training.targets[chosen])

    def held_back(self) -> Rows:
        """See Task."""
        return self._held

    def measures(self, right: NDArray[np.bool_], asked: NDArray[np.bool_]) -> dict[str, float]:
        """The share of sums whose every digit is right, and of digits."""
        return {
            "exact_match": float((right == asked).all(axis=1).mean()),
            "digits": float(right.sum() / asked.sum()),
        }

    def baselines(self) -> dict[str, float]:
        """The sum that is most frequent in the training part, always."""
        sums = np.array([one + other for one, other in self.training])
        most = int(np.bincount(sums).argmax())
        return {"most_frequent_sum": float(np.mean([one + other == most for one, other in self.held]))}


class Permutations(Task):
    """Functions given by examples: `a4b1a4c` asks what the function makes of `c`, in each row another one.

    A function takes six letters to six digits, one to one; its arguments are drawn anew each time: after k pairs
    (shots) an argument has been seen or not, and if not, the values seen are excluded. A fifth of the 720 functions is
    held back, so that what counts is reading the examples.
    """

    title = "functions given by examples"
    description = (
        "Applies a function that only the prompt tells: in `a4b1c2a` the examples say that a becomes 4. The functions "
        "take six letters to six digits, one to one; those of the test were in no training."
    )
    letters, digits = "abcdef", "123456"
    characters = letters + digits
    pairs = 13
    context = 2 * pairs
    measure = "five_shot_accuracy"
    least = 0.72
    """Five examples can tell 0.765; one who only repeats what was seen, and else guesses, has 0.665."""
    serving: ClassVar = {
        "length": 1,
        "temperature": 0.0,
        "pattern": "(?:[a-f][1-6]){0,12}[a-f]",
        "example": "a4b1c2a",
    }
    shots = (0, 1, 2, 5, 8, 12)
    rows_each = 40
    """Held-back rows of each held-back function."""

    def __init__(self) -> None:
        every = np.array(list(itertools.permutations(range(len(self.letters)))), np.int64)
        every = every[np.random.default_rng(SPLIT_SEED).permutation(len(every))]
        cut = len(every) // 5
        self.held, self.training = every[:cut], every[cut:]
        self._letters, self._digits = (np.array(self.tokenizer.encode(part)) for part in (self.letters, self.digits))

    def rows(self, functions: Ints, arguments: Ints) -> Rows:
        """Rows from functions `[B, 6]` and arguments `[B, pairs]`; the answers are the values."""
        values = np.take_along_axis(functions, arguments, axis=1)
        ids = np.stack((self._letters[arguments], self._digits[values]), axis=-1)  # [B, pairs, 2]
        asked = np.zeros_like(ids, bool)
        asked[..., 1] = True
        return _shifted(ids.reshape(len(ids), -1), asked.reshape(len(ids), -1))

    def draw(self, rng: np.random.Generator, count: int) -> Rows:
        """See Task."""
        functions = self.training[rng.integers(0, len(self.training), count)]
        return self.rows(functions, rng.integers(0, len(self.letters), (count, self.pairs)))

    def held_back(self) -> Rows:
        """See Task."""
        functions = np.repeat(self.held, self.rows_each, axis=0)
        rng = np.random.default_rng(SPLIT_SEED + 1)
        return self.rows(functions, rng.integers(0, len(self.letters), (len(functions), self.pairs)))

    def measures(self, right: NDArray[np.bool_], asked: NDArray[np.bool_]) -> dict[str, float]:
        """Accuracy after so many shots."""
        accuracy = right.sum(axis=0)[0::2] / asked.sum(axis=0)[0::2]  # an argument stands at 0, 2, …
        by_shots = {f"accuracy_{shots}_shots": float(accuracy[shots]) for shots in self.shots}
        return {self.measure: by_shots["accuracy_5_shots"], **by_shots}

    def baselines(self) -> dict[str, float]:
        """Guessing, and the most that five examples can tell."""
        return {"chance": 1 / len(self.letters), "best_possible": self.best_possible(5)}

    def best_possible(self, shots: int) -> float:
        """The accuracy of one who forgets nothing: sure of an argument seen, else guessing among the values left.

        By the distribution of the number of different arguments among so many draws.
        """
        size = len(self.letters)
        seen = np.zeros(size + 1)
        seen[0] = 1.0
        for _ in range(shots):
            repeated = seen * np.arange(size + 1) / size
            seen = repeated + np.concatenate(([0.0], (seen * (size - np.arange(size + 1)) / size)[:-1]))
        known = np.arange(size) / size
        return float((seen[:size] * (known + (1 - known) / (size - np.arange(size)))).sum() + seen[size])


TASKS: dict[str, Callable[[], Task]] = {"addition": Addition, "permutations": Permutations}


class TaskBatches:
    """Random rows of a task, the same for the same (seed, epoch, step)."""

    def __init__(self, task: Task, batch: int, seed: int, steps: int) -> None:
        self.task, self.size, self.seed = task, batch, seed
        self.steps_per_epoch = steps

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets `[B, T]`."""
        rows = self.task.draw(sample_rng(self.seed, epoch, step), self.size)
        return torch.from_numpy(rows.tokens), torch.from_numpy(rows.targets)


def _both_orders(pair: tuple[int, int]) -> list[tuple[int, int]]:
    one, other = pair
    return [(one, other)] if one == other else [(one, other), (other, one)]


def _shifted(ids: Ints, asked: NDArray[np.bool_]) -> Rows:
    return Rows(ids[:, :-1], np.where(asked, ids, PAD)[:, 1:])
