"""The graphs that a translator is exported as: an encoder, and one step of the decoder with its cache outside."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from services.nlp.training.models.attention import HIDDEN, padding_mask
from services.nlp.training.models.gpt import Gpt
from services.nlp.training.models.transformer import Transformer
from shared.training.export import export_graph

Tensors = list[Tensor]


class EncoderGraph(nn.Module):
    """Source `[B, S]` → keys and values `[B, heads, S, width]` of the memory for each decoder layer."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, source: Tensor) -> tuple[Tensor, ...]:
        """Keys of layer 0, values of layer 0, keys of layer 1, …"""
        return tuple(tensor for pair in self.model.cross(self.model.encode(source)) for tensor in pair)


class StepGraph(nn.Module):
    """One step of the decoder for every row, whatever its position.

    Inputs: `token`, `position`, `source_length` `[B]`; `cache` and `cross`: keys and values of each layer, `[B,
        heads, P, width]` of the positions before and `[B, heads, S, width]` of the source. Positions from `position`
        and `source_length` on are hidden, so rows of different lengths share a step.

    Outputs: log-probabilities `[B, V]` of the next token, attention `[B, layers, heads, S]`, and this position's keys
        and values `[B, heads, width]` of each layer.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, token: Tensor, position: Tensor, source_length: Tensor, cache: Tensors, cross: Tensors
    ) -> tuple[Tensor, ...]:
        """See the class."""
        P, S = cache[0].shape[2], cross[0].shape[2]
        past = torch.where(torch.arange(P)[None] < position[:, None], 0.0, HIDDEN)  # [B, P]
        mask = nn.functional.pad(past, (0, 1))[:, None, None, :]  # [B, 1, 1, P + 1]: this position is seen
        cross_mask = padding_mask(torch.arange(S)[None] < source_length[:, None])
        x = self.model.target(token[:, None], position[:, None])  # [B, 1, width]
        new: Tensors = []
        looks: Tensors = []
        for index, layer in enumerate(self.model.decoder):
            of_layer = slice(2 * index, 2 * index + 2)
            x, own, weights = layer.step(x, cache[of_layer], mask, cross[of_layer], cross_mask)  # type: ignore[operator]
            new += [tensor[:, :, 0] for tensor in own]
            looks.append(weights[:, :, 0])
        return torch.log_softmax(self.model.logits(x[:, 0]), dim=-1), torch.stack(looks, dim=1), *new


def cache_names(layers: int, prefix: str = "") -> list[str]:
    """Names of the keys and values of each layer."""
    return [f"{prefix}{kind}_{layer}" for layer in range(layers) for kind in ("keys", "values")]


def export_encoder(model: Transformer, path: Path) -> None:
    """Writes the encoder's graph."""
    batch, source = torch.export.Dim("batch", min=1), torch.export.Dim("source", min=1)
    export_graph(
        EncoderGraph(model).eval(),
        (torch.ones(2, 5, dtype=torch.int64),),
        ({0: batch, 1: source},),
        path,
        input_names=["source"],
        output_names=cache_names(model.config.layers, "cross_"),
    )


def export_step(model: Transformer, path: Path, *, max_bytes: int) -> None:
    """Writes the graph of one step."""
    config = model.config
    batch, past, source = (torch.export.Dim(name, min=1) for name in ("batch", "past", "source"))
    caches = 2 * config.layers
    numbers = {0: batch}
    export_graph(
        StepGraph(model).eval(),
        step_examples(model, rows=2, past=3, source=5),
        (numbers, numbers, numbers, [{0: batch, 2: past}] * caches, [{0: batch, 2: source}] * caches),
        path,
        input_names=[
            "token",
            "position",
            "source_length",
            *cache_names(config.layers),
            *cache_names(config.layers, "cross_"),
        ],
        output_names=["log_probabilities", "attention", *cache_names(config.layers, "new_")],
        max_bytes=max_bytes,
    )


def step_examples(
    model: Transformer, *, rows: int, past: int, source: int
) -> tuple[Tensor, Tensor, Tensor, Tensors, Tensors]:
    """Random inputs of a step: positions and source lengths differ from row to row."""
    config = model.config
    own = (rows, config.heads, past, config.width // config.heads)
    other = (rows, config.heads, source, config.width // config.heads)
    return (
        torch.randint(4, config.target_vocabulary, (rows,)),
        past - torch.arange(rows) % past,
        source - torch.arange(rows) % source,
        [torch.randn(own) for _ in range(2 * config.layers)],
        [torch.randn(other) for _ in range(2 * config.layers)],
    )


class GptGraph(nn.Module):
    """Positions behind a cache: one in a step, many when a prompt is read.

    Inputs: `tokens` `[B, Q]`; `position` `[B]`, where the first of them stands; `cache`: keys and values `[B, heads,
        P, width]` of each layer, of which those from `position` on are hidden.

    Outputs: log-probabilities `[B, Q, V]` of what follows each, and their keys and values `[B, heads, Q, width]` of
        each layer.
    """

    def __init__(self, model: Gpt) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, position: Tensor, cache: Tensors) -> tuple[Tensor, ...]:
        """See the class."""
        Q, P = tokens.shape[1], cache[0].shape[2]
        past = torch.where(torch.arange(P)[None] < position[:, None], 0.0, HIDDEN)  # [B, P]
        later = torch.arange(Q)[None] > torch.arange(Q)[:, None]
        own = torch.where(later, HIDDEN, 0.0)  # [Q, Q]
        mask = torch.cat((past[:, None].expand(-1, Q, -1), own[None].expand(tokens.shape[0], -1, -1)), dim=-1)[:, None]
        x = self.model.tokens(tokens) + self.model.positions(position[:, None] + torch.arange(Q)[None])
        new: Tensors = []
        for index, block in enumerate(self.model.blocks):
            x, made = block.step(x, (cache[2 * index], cache[2 * index + 1]), mask)  # type: ignore[operator]
            new += made
        return torch.log_softmax(self.model.logits(x), dim=-1), *new


def export_gpt(model: Gpt, path: Path) -> None:
    """Writes the graph of a language model."""
    layers = model.config.layers
    batch, new, past = (torch.export.Dim(name, min=1) for name in ("batch", "new", "past"))
    export_graph(
        GptGraph(model).eval(),
        gpt_examples(model, rows=2, new=3, past=5),
        ({0: batch, 1: new}, {0: batch}, [{0: batch, 2: past}] * (2 * layers)),
        path,
        input_names=["tokens", "position", *cache_names(layers)],
        output_names=["log_probabilities", *cache_names(layers, "new_")],
    )


def gpt_examples(model: Gpt, *, rows: int, new: int, past: int) -> tuple[Tensor, Tensor, Tensors]:
    """Random inputs: positions differ from row to row."""
    config = model.config
    shape = (rows, config.heads, past, config.width // config.heads)
    return (
        torch.randint(4, config.vocabulary, (rows, new)),
        past - torch.arange(rows) % past,
        [torch.randn(shape) for _ in range(2 * config.layers)],
    )
