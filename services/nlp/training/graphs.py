"""The graphs that a translator is exported as: an encoder, and one step of the decoder with its cache outside."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from services.nlp.training.models.attention import HIDDEN, padding_mask
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
