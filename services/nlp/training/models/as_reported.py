"""The course report's Transformer with its mistakes, for the study that shows what each of them costs; never served.

What differs from `transformer.py`, which follows the paper: scores are divided by sqrt(width) and not by that of a
head's width; 6 heads keep their default width of 64 on a width of 128; no projection but the output's has a bias;
LayerNorm comes behind each part and not in front; embeddings begin at N(0, 1), are not scaled, and are the output layer
as well, so that the first logits are huge; nothing drops out of the embeddings. Positions count from 1, and 0 is the
zero vector of padding: the report decoded from 0, which `start(source, 0)` does too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from services.nlp.training.models.attention import MultiHeadAttention
from services.nlp.training.models.dropout import Dropout
from services.nlp.training.models.transformer import (
    DecoderLayer,
    EncoderLayer,
    Transformer,
    TransformerConfig,
    sinusoids,
)

HEAD_WIDTH = 64


class ReportAttention(MultiHeadAttention):
    """Heads of 64, whatever the width; scores divided by sqrt(width)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        nn.Module.__init__(self)
        self.heads, self.head_width, self.divisor = heads, HEAD_WIDTH, math.sqrt(width)
        self.query = nn.Linear(width, heads * HEAD_WIDTH, bias=False)
        self.keys_values = nn.Linear(width, 2 * heads * HEAD_WIDTH, bias=False)
        self.output = nn.Linear(heads * HEAD_WIDTH, width)
        self.dropout = Dropout(dropout)


class ReportEmbedding(nn.Module):
    """Tokens as they are and their positions, of which 0 is nothing."""

    def __init__(self, vocabulary: int, config: TransformerConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, config.width)
        positions = sinusoids(config.max_length, config.width)
        positions[0] = 0
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """`[B, T]` tokens, `[B, T]` or `[T]` positions → `[B, T, width]`."""
        table: Tensor = self.positions  # type: ignore[assignment]
        embedded: Tensor = self.table(tokens) + table[positions]
        return embedded


def _feed_forward(config: TransformerConfig) -> nn.Sequential:
    inner = nn.Linear(config.width, config.feed_forward)
    return nn.Sequential(inner, nn.ReLU(), nn.Linear(config.feed_forward, config.width))


class ReportEncoderLayer(EncoderLayer):
    """x = LN(x + attention(x)); x = LN(x + feed_forward(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        nn.Module.__init__(self)
        self.attention = ReportAttention(config.width, config.heads, config.dropout)
        self.feed_forward = _feed_forward(config)  # type: ignore[assignment]
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(2))
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`[B, S, width]` → `[B, S, width]`."""
        x = self.norms[0](x + self.dropout(self.attention(x, x, mask)))
        answer: Tensor = self.norms[1](x + self.dropout(self.feed_forward(x)))
        return answer


class ReportDecoderLayer(DecoderLayer):
    """x = LN(x + self_attention(x)); x = LN(x + cross_attention(x, memory)); x = LN(x + feed_forward(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        nn.Module.__init__(self)
        self.self_attention = ReportAttention(config.width, config.heads, config.dropout)
        self.cross_attention = ReportAttention(config.width, config.heads, config.dropout)
        self.feed_forward = _feed_forward(config)  # type: ignore[assignment]
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(3))
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor, cross: tuple[Tensor, Tensor], cross_mask: Tensor) -> Tensor:
        """See DecoderLayer."""
        x = self.norms[0](x + self.dropout(self.self_attention(x, x, mask)))
        return self._rest(x, cross, cross_mask)[0]

    def step(
        self, x: Tensor, cache: tuple[Tensor, Tensor], mask: Tensor, cross: tuple[Tensor, Tensor], cross_mask: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """See DecoderLayer."""
        new = self.self_attention.project(x)
        keys, values = (torch.cat((old, own), dim=2) for old, own in zip(cache, new, strict=True))
        x = self.norms[0](x + self.self_attention.attend(x, keys, values, mask)[0])
        answer, weights = self._rest(x, cross, cross_mask)
        return answer, new, weights

    def _rest(self, x: Tensor, cross: tuple[Tensor, Tensor], cross_mask: Tensor) -> tuple[Tensor, Tensor]:
        looked, weights = self.cross_attention.attend(x, *cross, cross_mask)
        x = self.norms[1](x + self.dropout(looked))
        answer: Tensor = self.norms[2](x + self.dropout(self.feed_forward(x)))
        return answer, weights


class ReportTransformer(Transformer):
    """Encoder and decoder as the report's program really made them."""

    first_position = 1

    def __init__(self, config: TransformerConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.source = ReportEmbedding(config.source_vocabulary, config)  # type: ignore[assignment]
        self.target = ReportEmbedding(config.target_vocabulary, config)  # type: ignore[assignment]
        self.encoder = nn.ModuleList(ReportEncoderLayer(config) for _ in range(config.layers))
        self.decoder = nn.ModuleList(ReportDecoderLayer(config) for _ in range(config.layers))
        self.encoder_norm = self.decoder_norm = nn.Identity()  # type: ignore[assignment]
        self.initialise()
