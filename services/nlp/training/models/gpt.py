"""GPT: a Transformer that sees what came before and predicts what comes next (Radford et al. 2018, 2019).

Pre-LN as in GPT-2: x += attention(LN x), x += W2 GELU(W1 LN x), a last LN, and logits by the tied embedding. Weights
start at N(0, .02), those that write into the residual stream at N(0, .02 / sqrt(2 layers)). Positions are learned, so
the network knows nothing beyond its context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from services.nlp.training.models.attention import MultiHeadAttention, causal_mask
from services.nlp.training.models.dropout import Dropout

EMBEDDING_STD = 0.02
"""As in GPT-2."""


@dataclass(frozen=True)
class GptConfig:
    """Sizes of the network."""

    vocabulary: int
    context: int = 128
    """Positions that it can see."""
    width: int = 128
    layers: int = 4
    heads: int = 4
    dropout: float = 0.0
    embedding_std: float = EMBEDDING_STD
    """Of tokens and positions at the start."""
    waves: bool = False
    """Whether positions start as sines and cosines of that size (Vaswani et al. 2017, section 3.5), not at random."""


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        width = config.width
        self.attention = MultiHeadAttention(width, config.heads, config.dropout)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`[B, T, width]` → `[B, T, width]`."""
        normed = self.norms[0](x)
        x = x + self.dropout(self.attention(normed, normed, mask))
        answer: Tensor = x + self.dropout(self.feed_forward(self.norms[1](x)))
        return answer

    def step(self, x: Tensor, cache: tuple[Tensor, Tensor], mask: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Positions behind those of the cache.

        Args:
            x: `[B, Q, width]`.
            cache: keys and values `[B, heads, P, head_width]`.
            mask: `[B, 1, Q, P + Q]`, first over the cache and then over the new positions.

        Returns:
            `[B, Q, width]`, and the new positions' keys and values.
        """
        normed = self.norms[0](x)
        new = self.attention.project(normed)
        x = x + self.attention.attend_in_parts(normed, cache, new, mask)
        answer: Tensor = x + self.feed_forward(self.norms[1](x))
        return answer, new


class Gpt(nn.Module):
    """The language model."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.dropout = Dropout(config.dropout)
        self.apply(_initialise)
        for name, weight in self.named_parameters():
            if name.endswith(("attention.output.weight", "feed_forward.2.weight")):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.layers))
        if config.embedding_std != EMBEDDING_STD:
            for embedding in (self.tokens, self.positions):
                nn.init.normal_(embedding.weight, std=config.embedding_std)
        if config.waves:
            with torch.no_grad():
                self.positions.weight.copy_(config.embedding_std * waves(config.context, config.width))

    def forward(self, tokens: Tensor) -> Tensor:
        """`[B, T]` → logits `[B, T, V]` of what follows each position; T is at most the context."""
        return self.logits(self.states(tokens))

    def states(self, tokens: Tensor) -> Tensor:
        """`[B, T]` → `[B, T, width]`, what the last block says of each position."""
        T = tokens.shape[1]
        x: Tensor = self.dropout(self.tokens(tokens) + self.positions(torch.arange(T)))
        mask = causal_mask(T)
        for block in self.blocks:
            x = block(x, mask)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """`[..., width]` → `[..., V]` by the tied embedding."""
        return nn.functional.linear(self.norm(x), self.tokens.weight)


def waves(length: int, width: int) -> Tensor:
    """`[length, width]`: sines, then cosines of the position, wavelengths from 2π to 2000π."""
    rates = torch.exp(-math.log(1000) * torch.arange(width // 2) / (width // 2))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
