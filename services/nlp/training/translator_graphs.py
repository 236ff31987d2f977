"""The two graphs of a translator, whatever its network: what export, check and study need to know of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from services.nlp.training.graphs import EncoderGraph, StepGraph, export_encoder, export_step, step_examples
from services.nlp.training.gru_graphs import (
    GruEncoderGraph,
    GruStepGraph,
    export_gru_encoder,
    export_gru_step,
    gru_step_examples,
)
from services.nlp.training.models.gru_translator import GruTranslator
from services.nlp.training.models.transformer import Transformer
from services.nlp.training.networks import Network
from shared.errors import ConfigurationError
from shared.training.export import MAX_BYTES, PARITY_TOLERANCE, open_session

FLOAT32_BYTES = 4 * MAX_BYTES
"""Of the float32 graph, which is not bundled."""
Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class TranslatorGraphs:
    """How a network is exported.

    Attributes:
        encoder: in PyTorch.
        step: likewise.
        examples: random inputs of a step, by (rows, positions before, source length).
        export_encoder: writes it.
        export_step: likewise.
    """

    encoder: nn.Module
    step: nn.Module
    examples: Callable[[int, int, int], tuple[Any, ...]]
    export_encoder: Callable[[Path], None]
    export_step: Callable[[Path], None]


def graphs_of(model: Network) -> TranslatorGraphs:
    """The graphs of a network."""
    if isinstance(model, GruTranslator):
        return TranslatorGraphs(
            GruEncoderGraph(model),
            GruStepGraph(model),
            lambda rows, past, source: gru_step_examples(model, rows=rows, source=source),
            lambda path: export_gru_encoder(model, path),
            lambda path: export_gru_step(model, path, max_bytes=FLOAT32_BYTES),
        )
    return _transformer_graphs(model)


def _transformer_graphs(model: Transformer) -> TranslatorGraphs:
    return TranslatorGraphs(
        EncoderGraph(model),
        StepGraph(model),
        lambda rows, past, source: step_examples(model, rows=rows, past=past, source=source),
        lambda path: export_encoder(model, path),
        lambda path: export_step(model, path, max_bytes=FLOAT32_BYTES),
    )


@torch.inference_mode()
def check_graphs(model: Network, encoder: Path, step: Path) -> float:
    """Largest difference between the graphs and PyTorch, over several batch sizes and lengths.

    Raises:
        ConfigurationError: it is above PARITY_TOLERANCE; the export is wrong.
    """
    graphs, worst = graphs_of(model), 0.0
    for rows, past, length in ((1, 1, 1), (2, 7, 4), (5, 3, 12)):
        source = torch.randint(4, model.config.source_vocabulary, (rows, length))
        source[-1, length // 2 + 1 :] = 0
        for graph, path, inputs in (
            (graphs.encoder, encoder, (source,)),
            (graphs.step, step, graphs.examples(rows, past, length)),
        ):
            found = run(open_session(path), inputs)
            for one, other in zip(graph(*inputs), found, strict=True):
                worst = max(worst, float(np.abs(one.numpy() - other).max()))
    if not worst <= PARITY_TOLERANCE:
        raise ConfigurationError(
            f"the exported graphs differ from PyTorch by {worst:.2e}, at most {PARITY_TOLERANCE:.0e}"
        )
    return worst


def run(session: ort.InferenceSession, inputs: tuple[Any, ...]) -> list[NDArray[Any]]:
    """Runs a graph with the arguments of the module that it was made from."""
    flat: list[Tensor] = []
    for argument in inputs:
        flat += argument if isinstance(argument, list) else [argument]
    feeds = {entry.name: tensor.numpy() for entry, tensor in zip(session.get_inputs(), flat, strict=True)}
    found: list[NDArray[Any]] = session.run(None, feeds)
    return found
