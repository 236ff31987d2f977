"""BERT: a Transformer that sees a text in both directions and fills its gaps (Devlin et al. 2019).

Its layer is GPT's: only the mask differs, which hides padding here and the future there. Differences from the paper:
LayerNorm stands in front of each part and once more at the end (pre-LN, Xiong et al. 2020), which learns at ten times
the paper's rate with so short a warm-up; weights start at N(0, .02), not truncated, those that write into the residual
stream at N(0, .02 / sqrt(2 layers)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from services.nlp.training.models.attention import padding_mask
from services.nlp.training.models.dropout import Dropout
from services.nlp.training.models.gpt import Block, GptConfig

SEGMENTS = 2


@dataclass(frozen=True)
class BertConfig:
    """Sizes of the network."""

    vocabulary: int
    context: int = 128
    """Longest input."""
    width: int = 128
    layers: int = 4
    heads: int = 4
    dropout: float = 0.1
    pad: int = 0
    """Id that fills short rows."""

    @property
    def block(self) -> GptConfig:
        """The same sizes, as a layer takes them."""
        return GptConfig(self.vocabulary, self.context, self.width, self.layers, self.heads, self.dropout)


class Bert(nn.Module):
    """The encoder with its two heads: one names masked pieces, one says whether the second text follows the first."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.tokens = nn.Embedding(config.vocabulary, width)
        self.positions = nn.Embedding(config.context, width)
        self.segments = nn.Embedding(SEGMENTS, width)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config.block) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.masked = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(config.vocabulary))
        self.pooler = nn.Linear(width, width)
        self.next = nn.Linear(width, 2)
        self.apply(initialise)
        for name, weight in self.named_parameters():
            if name.endswith(("attention.output.weight", "feed_forward.2.weight")):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.layers))

    def forward(self, tokens: Tensor, segments: Tensor) -> Tensor:
        """`[B, T]` tokens, padding at the end, and segments 0 or 1 → `[B, T, width]`."""
        mask = padding_mask(tokens != self.config.pad)  # [B, 1, 1, T]
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1])) + self.segments(segments)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, mask)
        answer: Tensor = self.norm(x)
        return answer

    def fill(self, hidden: Tensor) -> Tensor:
        """`[..., width]` of masked positions → logits `[..., V]`, by the tied embedding."""
        return nn.functional.linear(self.masked(hidden), self.tokens.weight, self.bias)

    def follows(self, hidden: Tensor) -> Tensor:
        """`[B, T, width]` → logits `[B, 2]`: another text, or the one that follows."""
        answer: Tensor = self.next(self.pool(hidden))
        return answer

    def pool(self, hidden: Tensor) -> Tensor:
        """`[B, T, width]` → `[B, width]`: what the first position, `[CLS]`, gathered."""
        return torch.tanh(self.pooler(hidden[:, 0]))


def mean_pool(hidden: Tensor, present: Tensor) -> Tensor:
    """Unit vectors `[B, width]`: the mean of `[B, T, width]` where `present` `[B, T]` says there is text."""
    weights = present.to(hidden.dtype)[:, :, None]
    mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    return nn.functional.normalize(mean, dim=-1)


def initialise(module: nn.Module) -> None:
    """Matrices at N(0, .02), biases at 0."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
