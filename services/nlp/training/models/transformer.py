"""The Transformer for translation (Vaswani et al. 2017), with LayerNorm in front of each part (Xiong et al. 2020).

Differences from the paper: pre-LN; embeddings start at N(0, 1/width) and are multiplied by sqrt(width), so that they
enter with variance 1; the output layer is the target's embedding.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from services.nlp.tokenizers.special import PAD
from services.nlp.training.models.attention import MultiHeadAttention, causal_mask, padding_mask
from services.nlp.training.models.dropout import Dropout


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the network."""

    source_vocabulary: int
    target_vocabulary: int
    width: int = 256
    feed_forward: int = 1024
    layers: int = 3
    heads: int = 4
    dropout: float = 0.2
    max_length: int = 256
    """Longest sequence of positions, source or target."""


def sinusoids(length: int, width: int) -> Tensor:
    """`[length, width]`: PE(p, 2i) = sin(p / 10000^(2i/width)), PE(p, 2i+1) = cos of the same (section 3.5)."""
    position = torch.arange(length, dtype=torch.float64)[:, None]
    angle = position / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    table = torch.empty(length, width)
    table[:, 0::2], table[:, 1::2] = angle.sin(), angle.cos()
    return table


class Embedding(nn.Module):
    """Tokens and their positions, which count from 0 in training and in decoding alike."""

    def __init__(self, vocabulary: int, config: TransformerConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, config.width)
        nn.init.normal_(self.table.weight, std=config.width**-0.5)
        self.scale = math.sqrt(config.width)
        self.dropout = Dropout(config.dropout)
        self.register_buffer("positions", sinusoids(config.max_length, config.width), persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """`[B, T]` tokens, `[B, T]` or `[T]` positions → `[B, T, width]`."""
        table: Tensor = self.positions  # type: ignore[assignment]
        embedded: Tensor = self.dropout(self.table(tokens) * self.scale + table[positions])
        return embedded


class FeedForward(nn.Sequential):
    """max(0, x W1 + b1) W2 + b2 (equation 2)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(
            nn.Linear(config.width, config.feed_forward),
            nn.ReLU(),
            Dropout(config.dropout),
            nn.Linear(config.feed_forward, config.width),
        )


class EncoderLayer(nn.Module):
    """x += attention(LN x); x += feed_forward(LN x)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(config.width, config.heads, config.dropout)
        self.feed_forward = FeedForward(config)
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(2))
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`[B, S, width]` → `[B, S, width]`."""
        normed = self.norms[0](x)
        x = x + self.dropout(self.attention(normed, normed, mask))
        answer: Tensor = x + self.dropout(self.feed_forward(self.norms[1](x)))
        return answer


class DecoderLayer(nn.Module):
    """x += self_attention(LN x); x += cross_attention(LN x, memory); x += feed_forward(LN x)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(config.width, config.heads, config.dropout)
        self.cross_attention = MultiHeadAttention(config.width, config.heads, config.dropout)
        self.feed_forward = FeedForward(config)
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(3))
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor, cross: tuple[Tensor, Tensor], cross_mask: Tensor) -> Tensor:
        """`[B, T, width]` → `[B, T, width]`; `cross` are the memory's keys and values of this layer."""
        normed = self.norms[0](x)
        x = x + self.dropout(self.self_attention(normed, normed, mask))
        x = x + self.dropout(self.cross_attention.attend(self.norms[1](x), *cross, cross_mask)[0])
        answer: Tensor = x + self.dropout(self.feed_forward(self.norms[2](x)))
        return answer

    def step(
        self, x: Tensor, cache: tuple[Tensor, Tensor], mask: Tensor, cross: tuple[Tensor, Tensor], cross_mask: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """One position, the ones before it from the cache.

        Args:
            x: `[B, 1, width]`.
            cache: keys and values `[B, heads, T, head_width]` of the positions before.
            mask: `[B, 1, 1, T + 1]` over the cache and, last, this position.
            cross: keys and values of the memory.
            cross_mask: `[B, 1, 1, S]`.

        Returns:
            `[B, 1, width]`, this position's keys and values, and the weights over the memory `[B, heads, 1, S]`.
        """
        normed = self.norms[0](x)
        new = self.self_attention.project(normed)
        keys, values = (torch.cat((old, own), dim=2) for old, own in zip(cache, new, strict=True))
        x = x + self.self_attention.attend(normed, keys, values, mask)[0]
        looked, weights = self.cross_attention.attend(self.norms[1](x), *cross, cross_mask)
        x = x + looked
        return x + self.feed_forward(self.norms[2](x)), new, weights


@dataclass(frozen=True)
class Decoded:
    """Where step-by-step decoding stands.

    Attributes:
        position: of the next token.
        cache: keys and values of each layer, `[B, heads, T, head_width]`, of the tokens before.
        cross: those of the memory.
        cross_mask: `[B, 1, 1, S]`.
    """

    position: int
    cache: list[tuple[Tensor, Tensor]]
    cross: list[tuple[Tensor, Tensor]]
    cross_mask: Tensor


class Transformer(nn.Module):
    """Encoder and decoder."""

    first_position = 0
    """Of positions, in training and in decoding alike."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.source = Embedding(config.source_vocabulary, config)
        self.target = Embedding(config.target_vocabulary, config)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.encoder_norm = nn.LayerNorm(config.width)
        self.decoder_norm = nn.LayerNorm(config.width)
        self.initialise()

    def initialise(self) -> None:
        """Draws all matrices but the embeddings (Glorot & Bengio 2010); biases begin at zero."""
        for name, weight in self.named_parameters():
            if weight.ndim == 2 and "table" not in name:
                nn.init.xavier_uniform_(weight)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def encode(self, source: Tensor) -> Tensor:
        """`[B, S]` tokens, PAD at the end → memory `[B, S, width]`."""
        mask = padding_mask(source != PAD)
        x = self.source(source, self.first_position + torch.arange(source.shape[1]))
        for layer in self.encoder:
            x = layer(x, mask)
        normed: Tensor = self.encoder_norm(x)
        return normed

    def cross(self, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the memory for each decoder layer."""
        return [layer.cross_attention.project(memory) for layer in self.decoder]  # type: ignore[operator, union-attr]

    def decode(self, target: Tensor, memory: Tensor, present: Tensor) -> Tensor:
        """Logits `[B, T, V]` after each prefix of `target` `[B, T]`; `present` `[B, S]` says where the memory is."""
        mask, cross_mask = causal_mask(target.shape[1]), padding_mask(present)
        x = self.target(target, self.first_position + torch.arange(target.shape[1]))
        for layer, cross in zip(self.decoder, self.cross(memory), strict=True):
            x = layer(x, mask, cross, cross_mask)
        return self.logits(x)

    def start(self, source: Tensor, first_position: int | None = None) -> Decoded:
        """`[B, S]` tokens → a decoder that has read nothing yet; counting from elsewhere is a mistake to study."""
        first = self.first_position if first_position is None else first_position
        cross = self.cross(self.encode(source))
        empty = cross[0][0][:, :, :0]
        return Decoded(first, [(empty, empty)] * len(cross), cross, padding_mask(source != PAD))

    def proceed(self, token: Tensor, state: Decoded) -> tuple[Tensor, Decoded]:
        """Logits `[B, V]` after `[B]` tokens more."""
        x = self.target(token[:, None], torch.tensor([state.position]))  # [B, 1, width]
        mask = torch.zeros(len(token), 1, 1, state.cache[0][0].shape[2] + 1)
        cache = []
        for layer, old, cross in zip(self.decoder, state.cache, state.cross, strict=True):
            x, new, _ = layer.step(x, old, mask, cross, state.cross_mask)  # type: ignore[operator]
            cache.append((torch.cat((old[0], new[0]), dim=2), torch.cat((old[1], new[1]), dim=2)))
        return self.logits(x)[:, 0], dataclasses.replace(state, position=state.position + 1, cache=cache)

    def logits(self, x: Tensor) -> Tensor:
        """`[..., width]` → `[..., V]` by the tied embedding."""
        return nn.functional.linear(self.decoder_norm(x), self.target.table.weight)

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        """(source `[B, S]`, target `[B, T]` that begins with BOS) → logits `[B, T, V]`."""
        source, target = pair
        return self.decode(target, self.encode(source), source != PAD)
