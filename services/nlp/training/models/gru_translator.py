"""Translation by two GRUs (Cho et al. 2014, Sutskever et al. 2014), the course report's, and the same with attention.

Without attention the encoder's last state is all that the decoder knows of the source. With it (Bahdanau et al. 2015,
or the dot product of Luong et al. 2015) each step also reads c, a mean of all the encoder's states by the scores of the
state before it: the input is [embedding; c], the output layer sees [state; c]. Unlike Bahdanau's, the encoder reads in
one direction and the output is a single layer, so that attention is the only difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from services.nlp.tokenizers.special import PAD
from services.nlp.training.models.attention import HIDDEN, AdditiveAttention, DotAttention
from services.nlp.training.models.gru import Gru, GruCell

Looking = Literal["none", "additive", "dot"]


@dataclass(frozen=True)
class GruConfig:
    """Sizes of the network; embeddings are as wide as states."""

    source_vocabulary: int
    target_vocabulary: int
    width: int = 256
    attention: Looking = "none"


@dataclass(frozen=True)
class Memory:
    """What the decoder knows of the source.

    Attributes:
        state: the encoder's last `[B, width]`, the decoder's first.
        states: all of them `[B, S, width]`.
        keys: what attention scores, `[B, S, width]`; the states themselves without it.
        mask: `[B, S]`, added to the scores.
    """

    state: Tensor
    states: Tensor
    keys: Tensor
    mask: Tensor


class GruTranslator(nn.Module):
    """Encoder and decoder of one layer each."""

    def __init__(self, config: GruConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.source = nn.Embedding(config.source_vocabulary, width, padding_idx=PAD)
        self.target = nn.Embedding(config.target_vocabulary, width, padding_idx=PAD)
        self.encoder = Gru(width, width)
        self.decoder = GruCell(width, width)
        self.attention: AdditiveAttention | DotAttention | None = None
        if config.attention != "none":
            self.attention = AdditiveAttention(width) if config.attention == "additive" else DotAttention()
            # the part of the cell's input matrix that meets c: that of the embedding is applied to all steps at once
            self.context = nn.Linear(width, 3 * width, bias=False)
            nn.init.uniform_(self.context.weight, -(width**-0.5), width**-0.5)
        self.output = nn.Linear(2 * width if self.attention else width, config.target_vocabulary)

    def read(self, source: Tensor) -> Memory:
        """`[B, S]` tokens, PAD at the end → what the decoder needs."""
        present = source != PAD
        states, last = self.encoder(self.source(source), present)
        keys = self.attention.keys(states) if self.attention else states
        return Memory(last, states, keys, ~present * HIDDEN)

    def advance(self, projected: Tensor, state: Tensor, memory: Memory) -> tuple[Tensor, Tensor, Tensor | None]:
        """One step of the decoder.

        Args:
            projected: `[B, 3 width]`, `decoder.input` of the token's embedding.
            state: `[B, width]` before it.
            memory: of the source.

        Returns:
            The new state, what the output layer reads (`[B, width]`, or `[B, 2 width]` with attention), and the weights
            over the source `[B, S]`, if there is attention.
        """
        if self.attention is None:
            state = self.decoder(projected, state)
            return state, state, None
        weights = torch.softmax(self.attention(state, memory.keys) + memory.mask, dim=-1)  # [B, S]
        context = (weights[:, None] @ memory.states)[:, 0]  # [B, width]
        state = self.decoder(projected + self.context(context), state)
        return state, torch.cat((state, context), dim=-1), weights

    def decode(self, target: Tensor, memory: Memory, *, forced: bool = True) -> Tensor:
        """Logits `[B, T, V]`.

        Args:
            target: `[B, T]`, BOS first.
            memory: of the source.
            forced: read `target` (teacher forcing); if not, only its first column, and then the own most probable
                token again and again.
        """
        state = memory.state
        seen: list[Tensor] = []
        projected = self.decoder.input(self.target(target if forced else target[:, :1]))  # [B, T or 1, 3 width]
        for step in range(target.shape[1]):
            following = projected[:, step] if forced or step == 0 else self._project_best(seen[-1])
            state, features, _ = self.advance(following, state, memory)
            seen.append(features)
        logits: Tensor = self.output(torch.stack(seen, dim=1))
        return logits

    def start(self, source: Tensor) -> tuple[Tensor, Memory]:
        """`[B, S]` tokens → the decoder's first state and what it looks at."""
        memory = self.read(source)
        return memory.state, memory

    def proceed(self, token: Tensor, state: tuple[Tensor, Memory]) -> tuple[Tensor, tuple[Tensor, Memory]]:
        """Logits `[B, V]` after `[B]` tokens more."""
        following, features, _ = self.advance(self.decoder.input(self.target(token)), *state)
        return self.output(features), (following, state[1])

    def _project_best(self, features: Tensor) -> Tensor:
        with torch.no_grad():
            token = self.output(features).argmax(-1)
        projected: Tensor = self.decoder.input(self.target(token))
        return projected

    def forward(self, inputs: tuple[Tensor, Tensor] | tuple[Tensor, Tensor, bool]) -> Tensor:
        """(source `[B, S]`, target `[B, T]` that begins with BOS, whether teacher-forced) → logits `[B, T, V]`."""
        source, target, *forced = inputs
        return self.decode(target, self.read(source), forced=bool(forced[0]) if forced else True)
