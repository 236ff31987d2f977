"""The networks that translate, by architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from services.nlp.training.models.as_reported import ReportTransformer
from services.nlp.training.models.gru_translator import GruConfig, GruTranslator
from services.nlp.training.models.transformer import Transformer, TransformerConfig

Architecture = Literal["transformer", "transformer-as-reported", "gru", "gru-attention", "gru-dot"]
Network = Transformer | GruTranslator
LOOKING: dict[Architecture, Literal["none", "additive", "dot"]] = {
    "gru": "none",
    "gru-attention": "additive",
    "gru-dot": "dot",
}
"""How the decoder of a GRU looks at the source."""


def make_network(architecture: Architecture, sizes: dict[str, Any]) -> Network:
    """A network with random weights; `sizes` are the fields of its configuration."""
    if architecture in LOOKING:
        return GruTranslator(GruConfig(**sizes))
    kind = ReportTransformer if architecture == "transformer-as-reported" else Transformer
    return kind(TransformerConfig(**sizes))


def load_network(folder: Path, result: dict[str, Any]) -> Network:
    """The trained network of a run, in eval mode; `result` is its `result.json`."""
    model = make_network(result.get("architecture", "transformer"), result["network"])
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return model.eval()
