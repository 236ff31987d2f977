"""Greedy decoding of many sentences at once, for validation; serving has its own decoders, over exported graphs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from services.nlp.tokenizers.special import BOS, EOS, PAD
from services.nlp.training.data import padded
from services.nlp.training.models.attention import padding_mask
from services.nlp.training.models.transformer import Transformer


@torch.inference_mode()
def greedy(model: Transformer, sources: Sequence[Sequence[int]], max_length: int, batch: int = 64) -> list[list[int]]:
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


def _greedy_batch(model: Transformer, source: Tensor, max_length: int) -> list[list[int]]:
    B, config = len(source), model.config
    cross, cross_mask = model.cross(model.encode(source)), padding_mask(source != PAD)
    empty = torch.zeros(B, config.heads, 0, config.width // config.heads)
    cache = [(empty, empty)] * config.layers
    token = torch.full((B, 1), BOS)
    answers, running = [], torch.ones(B, dtype=torch.bool)
    for position in range(max_length):
        x = model.target(token, torch.tensor([position]))
        mask = torch.zeros(B, 1, 1, position + 1)
        for index, layer in enumerate(model.decoder):
            x, new, _ = layer.step(x, cache[index], mask, cross[index], cross_mask)  # type: ignore[operator]
            cache[index] = tuple(torch.cat(pair, dim=2) for pair in zip(cache[index], new, strict=True))  # type: ignore[assignment]
        token = model.logits(x)[:, 0].argmax(-1, keepdim=True)
        answers.append(torch.where(running, token[:, 0], EOS))
        running &= token[:, 0] != EOS
        if not running.any():
            break
    rows = torch.stack(answers, dim=1).tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in rows]
