"""Heads on a language model for tasks about text (Radford et al. 2018, section 3.3 and figure 1).

An example is one row of tokens or several, each from START to EXTRACT; the state at EXTRACT, normed, is what is read:

- classification: one row, `start text extract`, a linear layer to the classes;
- entailment: the same, with `start premise delimiter hypothesis extract`;
- similarity: two rows, one for each order, their states added, and the linear layer;
- multiple choice: a row for each answer, `start context delimiter answer extract`, a score each, softmax over them.

Training adds half the language model's own loss on these rows (equation 5: L3 = L2 + .5 L1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.nlp.tokenizers.special import BOS, EOS, PAD, UNK
from services.nlp.training.models.gpt import Gpt

START, DELIMITER, EXTRACT = BOS, UNK, EOS
"""A text in characters that were all seen has no UNK, so that its id is free."""
LANGUAGE_MODEL_WEIGHT = 0.5


def row_of(*texts: Sequence[int]) -> list[int]:
    """One row: `start text extract`, or `start text delimiter text extract`."""
    joined = list(texts[0])
    for text in texts[1:]:
        joined += [DELIMITER, *text]
    return [START, *joined, EXTRACT]


class GptWithHead(nn.Module):
    """A language model that answers a task.

    Args:
        gpt: the language model; may be pretrained.
        outputs: classes of classification, entailment and similarity; 1 is multiple choice.
        frozen: only the head learns, from a network that stays as it is.
    """

    def __init__(self, gpt: Gpt, outputs: int, *, frozen: bool = False) -> None:
        super().__init__()
        self.gpt = gpt.requires_grad_(not frozen)
        self.head = nn.Linear(gpt.config.width, outputs)
        self.frozen = frozen
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """The answers.

        Args:
            tokens: the rows of each example `[B, rows, T]`, filled up with PAD behind EXTRACT.

        Returns:
            Logits `[B, classes]`, or of multiple choice `[B, rows]`.
        """
        return self.answer(self.states(tokens), tokens)

    def states(self, tokens: Tensor) -> Tensor:
        """`[B, rows, T]` → `[B, rows, T, width]`."""
        states = self.gpt.states(tokens.flatten(0, 1))
        return states.view(*tokens.shape, -1)

    def answer(self, states: Tensor, tokens: Tensor) -> Tensor:
        """The head's logits from the states `[B, rows, T, width]` of `tokens`."""
        where = (tokens == EXTRACT).int().argmax(-1)  # [B, rows]
        index = where[..., None, None].expand(-1, -1, 1, states.shape[-1])
        read = self.gpt.norm(states.gather(2, index).squeeze(2))  # [B, rows, width]
        if self.head.out_features == 1:
            return self.head(read).squeeze(-1)  # type: ignore[no-any-return]
        return self.head(read.sum(dim=1))  # type: ignore[no-any-return]

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """L3 over examples `[B, rows, T]` with their answers `[B]`; of a frozen network L2 alone: nothing else moves.

        The language model should have foreseen every token behind START.
        """
        states = self.states(tokens)
        task = F.cross_entropy(self.answer(states, tokens), labels)
        if self.frozen:
            return task
        targets = tokens[..., 1:]
        foreseen = self.gpt.logits(states[..., :-1, :])
        language = F.cross_entropy(foreseen.flatten(0, 2), targets.flatten(), ignore_index=PAD)
        return task + LANGUAGE_MODEL_WEIGHT * language


class Objective(nn.Module):
    """`(tokens, labels)` → the loss, for a loop that knows models and losses apart."""

    def __init__(self, model: GptWithHead) -> None:
        super().__init__()
        self.model = model

    def forward(self, example: tuple[Tensor, Tensor]) -> Tensor:
        """See GptWithHead.loss."""
        return self.model.loss(*example)


def padded_examples(examples: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """`[B, rows, T]` from the rows of examples, PAD behind each row's end."""
    length = max(len(row) for rows in examples for row in rows)
    return torch.tensor([[[*row, *[PAD] * (length - len(row))] for row in rows] for rows in examples])
