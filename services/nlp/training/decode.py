"""Greedy decoding of many sentences at once, for validation; serving has its own decoders, over exported graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from services.nlp.tokenizers.special import BOS, EOS
from services.nlp.training.data import padded


class Stepping(Protocol):
    """A translator that decodes one token after the other."""

    def start(self, source: Tensor) -> Any:
        """`[B, S]` tokens → whatever the first step needs."""
        ...

    def proceed(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        """`[B]` tokens and what the step before left → logits `[B, V]` and what the next one needs."""
        ...


@torch.inference_mode()
def greedy(model: Stepping, sources: Sequence[Sequence[int]], max_length: int, batch: int = 64) -> list[list[int]]:
    """The most probable token again and again, until EOS or `max_length` tokens.

    Args:
        model: in eval mode.
        sources: ids of each sentence.
        max_length: tokens at most.
        batch: sentences at a time; those of like length run together.

    Returns:
        Ids of each translation without EOS, in the order of the sources.
    """
    order = sorted(range(len(sources)), key=lambda index: len(sources[index]))
    found: list[list[int]] = [[]] * len(sources)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        for index, ids in zip(
            chosen, _greedy_batch(model, padded([sources[i] for i in chosen]), max_length), strict=True
        ):
            found[index] = ids
    return found


def _greedy_batch(model: Stepping, source: Tensor, max_length: int) -> list[list[int]]:
    state = model.start(source)
    token, running = torch.full((len(source),), BOS), torch.ones(len(source), dtype=torch.bool)
    answers = []
    for _ in range(max_length):
        logits, state = model.proceed(token, state)
        token = logits.argmax(-1)
        answers.append(torch.where(running, token, EOS))
        running &= token != EOS
        if not running.any():
            break
    rows = torch.stack(answers, dim=1).tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in rows]
