"""The graphs that a GRU translator is exported as: an encoder, and one step of the decoder with its state outside."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from services.nlp.tokenizers.special import PAD
from services.nlp.training.models.attention import HIDDEN
from services.nlp.training.models.gru import GruCell
from services.nlp.training.models.gru_translator import GruTranslator, Memory
from shared.training.export import export_graph

SOURCE = ("cross_states", "cross_keys")
"""What attention looks at, by the encoder's output and the step's input."""


class GruEncoderGraph(nn.Module):
    """Source `[B, S]` → the decoder's first state `[B, width]` and, with attention, the encoder's states and keys `[B,
    1, S, width]`: they look like the keys and values of a Transformer with one head.

    Where there is padding, states are zero. In the graph the layer is ONNX's own operator, which alone leaves the
    length free; PyTorch runs the layer that is written out, so that the parity of the two says something.
    """

    input: Tensor
    hidden: Tensor
    bias: Tensor

    def __init__(self, model: GruTranslator) -> None:
        super().__init__()
        self.model = model
        for name, tensor in onnx_weights(model.encoder.cell).items():
            self.register_buffer(name, tensor)

    def forward(self, source: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        present = source != PAD
        x = self.model.source(source)
        if torch.compiler.is_exporting():
            states, last = self._operator(x, present.sum(1).to(torch.int32))
        else:
            states, last = self.model.encoder(x, present)
            states = states * present[..., None]
        if self.model.attention is None:
            return (last,)
        return last, states[:, None], self.model.attention.keys(states)[:, None]

    def _operator(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        B, S, width = x.shape
        states, last = torch.onnx.ops.symbolic_multi_out(
            "GRU",
            (x.transpose(0, 1), self.input, self.hidden, self.bias, lengths),
            {"hidden_size": width, "linear_before_reset": 1},
            dtypes=(torch.float32, torch.float32),
            shapes=((S, 1, B, width), (1, B, width)),
            version=14,
        )
        return states[:, 0].transpose(0, 1), last[0]


def onnx_weights(cell: GruCell) -> dict[str, Tensor]:
    """The cell's matrices `[1, 3 width, …]` and its biases `[1, 6 width]` with the gates in ONNX's order: z, r, n."""

    def turned(tensor: Tensor) -> Tensor:
        reset, keep, new = tensor.detach().chunk(3)
        return torch.cat((keep, reset, new))

    biases = torch.cat((turned(cell.input.bias), turned(cell.hidden.bias)))
    return {"input": turned(cell.input.weight)[None], "hidden": turned(cell.hidden.weight)[None], "bias": biases[None]}


class GruStepGraph(nn.Module):
    """One step of the decoder for every row, whatever its position.

    Inputs: `token` `[B]`; `state` `[B, width]`; with attention also `source_length` `[B]` and what the encoder gave,
        `[B, 1, S, width]`, of which positions from `source_length` on are hidden.

    Outputs: log-probabilities `[B, V]` of the next token, with attention its weights `[B, 1, 1, S]`, and the new state.
    """

    def __init__(self, model: GruTranslator) -> None:
        super().__init__()
        self.model = model

    def forward(self, token: Tensor, state: Tensor, source: list[Tensor]) -> tuple[Tensor, ...]:
        """See the class."""
        model = self.model
        memory = _memory(state, *source) if source else Memory(state, state, state, state)
        following, features, weights = model.advance(model.decoder.input(model.target(token)), state, memory)
        answer = torch.log_softmax(model.output(features), dim=-1)
        return (answer, following) if weights is None else (answer, weights[:, None, None], following)


def _memory(state: Tensor, source_length: Tensor, states: Tensor, keys: Tensor) -> Memory:
    hidden = torch.arange(states.shape[2])[None] >= source_length[:, None]
    return Memory(state, states[:, 0], keys[:, 0], hidden * HIDDEN)


def export_gru_encoder(model: GruTranslator, path: Path) -> None:
    """Writes the encoder's graph."""
    batch, source = torch.export.Dim("batch", min=1), torch.export.Dim("source", min=1)
    looks = model.attention is not None
    export_graph(
        GruEncoderGraph(model).eval(),
        (torch.ones(2, 5, dtype=torch.int64),),
        ({0: batch, 1: source},),
        path,
        input_names=["source"],
        output_names=["state", *SOURCE] if looks else ["state"],
    )


def export_gru_step(model: GruTranslator, path: Path, *, max_bytes: int) -> None:
    """Writes the graph of one step."""
    batch, source = torch.export.Dim("batch", min=1), torch.export.Dim("source", min=1)
    looks, rows = model.attention is not None, {0: batch}
    of_source = [rows, {0: batch, 2: source}, {0: batch, 2: source}] if looks else []
    export_graph(
        GruStepGraph(model).eval(),
        gru_step_examples(model, rows=2, source=5),
        (rows, rows, of_source),
        path,
        input_names=["token", "state", *(["source_length", *SOURCE] if looks else [])],
        output_names=["log_probabilities", *(["attention"] if looks else []), "new_state"],
        max_bytes=max_bytes,
    )


def gru_step_examples(model: GruTranslator, *, rows: int, source: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Random inputs of a step: source lengths differ from row to row."""
    width = model.config.width
    given = torch.randint(4, model.config.target_vocabulary, (rows,)), torch.tanh(torch.randn(rows, width))
    if model.attention is None:
        return *given, []
    shape = (rows, 1, source, width)
    return *given, [source - torch.arange(rows) % source, torch.tanh(torch.randn(shape)), torch.randn(shape)]
