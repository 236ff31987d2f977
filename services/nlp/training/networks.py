"""The networks that translate, by architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from services.nlp.training.models.gru_translator import GruConfig, GruTranslator
from services.nlp.training.models.transformer import Transformer, TransformerConfig

Architecture = Literal["transformer", "gru", "gru-attention", "gru-dot"]
Network = Transformer | GruTranslator
LOOKING: dict[Architecture, Literal["none", "additive", "dot"]] = {
    "gru": "none",
    "gru-attention": "additive",
    "gru-dot": "dot",
}
"""How the decoder of a GRU looks at the source."""


def load_network(folder: Path, result: dict[str, Any]) -> Network:
    """The trained network of a run, in eval mode; `result` is its `result.json`."""
    sizes = result["network"]
    is_transformer = result.get("architecture", "transformer") == "transformer"
    model = Transformer(TransformerConfig(**sizes)) if is_transformer else GruTranslator(GruConfig(**sizes))
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return model.eval()
