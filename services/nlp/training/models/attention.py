"""Attention, written out: multi-head (Vaswani et al. 2017, section 3.2), additive and by dot product.

Masks are added to the scores: 0 where a position may be seen, a large negative number where not. All dimensions of a
mask broadcast, so `[B, 1, 1, S]` hides padding and `[1, 1, T, T]` the future.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from services.nlp.training.models.dropout import Dropout

HIDDEN = -1e4
"""Added to a score that must not count: exp(-1e4) is 0 in every float type, and no row becomes not-a-number."""


class MultiHeadAttention(nn.Module):
    """softmax(Q Kᵀ / sqrt(d_k)) V over `heads` heads of width d_k = `width / heads`, joined, projected (equation 1)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        self.heads, self.head_width = heads, width // heads
        self.divisor = math.sqrt(self.head_width)
        self.query = nn.Linear(width, width)
        self.keys_values = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        self.dropout = Dropout(dropout)

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of what is looked at: `[B, S, width]` → twice `[B, heads, S, head_width]`."""
        keys, values = self.keys_values(memory).chunk(2, dim=-1)
        return self._split(keys), self._split(values)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Looks.

        Args:
            queries: `[B, T, width]`.
            keys: `[B, heads, S, head_width]`, from `project`.
            values: likewise.
            mask: added to the scores `[B, heads, T, S]`.

        Returns:
            The answers `[B, T, width]` and the weights `[B, heads, T, S]`.
        """
        q = self._split(self.query(queries))  # [B, heads, T, head_width]
        scores = q @ keys.transpose(-2, -1) / self.divisor  # [B, heads, T, S]
        if mask is not None:
            scores = scores + mask
        weights = torch.softmax(scores, dim=-1)
        mixed = self.dropout(weights.to(values.dtype)) @ values  # [B, heads, T, head_width]
        joined = mixed.transpose(1, 2).flatten(2)  # [B, T, width]
        return self.output(joined), weights

    def attend_in_parts(
        self, queries: Tensor, cache: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], mask: Tensor
    ) -> Tensor:
        """As `attend` over the cache and the new positions together, without joining them: a long cache is not copied.

        Args:
            queries: `[B, Q, width]`.
            cache: keys and values `[B, heads, P, head_width]`.
            new: keys and values `[B, heads, Q, head_width]`.
            mask: added to the scores `[B, heads, Q, P + Q]`.
        """
        P = cache[0].shape[2]
        q = self._split(self.query(queries)) / self.divisor
        scores = torch.cat([q @ part[0].transpose(-2, -1) for part in (cache, new)], dim=-1) + mask
        weights = torch.softmax(scores, dim=-1)
        mixed = weights[..., :P] @ cache[1] + weights[..., P:] @ new[1]
        answer: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return answer

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[B, T, width]` queries over `[B, S, width]` → `[B, T, width]`."""
        keys, values = self.project(memory)
        return self.attend(queries, keys, values, mask)[0]

    def _split(self, value: Tensor) -> Tensor:
        return value.view(*value.shape[:-1], self.heads, self.head_width).transpose(1, 2)


class AdditiveAttention(nn.Module):
    """Scores e_i = v · tanh(W s + U h_i) (Bahdanau et al. 2015, appendix A.1.2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.memory = nn.Linear(width, width, bias=False)
        self.score = nn.Linear(width, 1, bias=False)

    def keys(self, memory: Tensor) -> Tensor:
        """U h of what is looked at `[B, S, width]`, once a sentence."""
        keys: Tensor = self.memory(memory)
        return keys

    def forward(self, state: Tensor, keys: Tensor) -> Tensor:
        """State `[B, width]`, keys `[B, S, width]` → scores `[B, S]`."""
        scores: Tensor = self.score(torch.tanh(self.query(state)[:, None] + keys))  # [B, S, 1]
        return scores[..., 0]


class DotAttention(nn.Module):
    """Scores e_i = s · h_i (Luong et al. 2015, equation 8)."""

    def keys(self, memory: Tensor) -> Tensor:
        """What is looked at `[B, S, width]`, as it is."""
        return memory

    def forward(self, state: Tensor, keys: Tensor) -> Tensor:
        """State `[B, width]`, keys `[B, S, width]` → scores `[B, S]`."""
        return (keys @ state[:, :, None])[..., 0]


def padding_mask(present: Tensor) -> Tensor:
    """`[B, S]` bool, true where there is a token → `[B, 1, 1, S]` to add to scores."""
    return (~present)[:, None, None, :] * HIDDEN


def causal_mask(length: int) -> Tensor:
    """`[1, 1, length, length]`: position t sees 0 to t."""
    return torch.full((length, length), HIDDEN).triu(1)[None, None]
