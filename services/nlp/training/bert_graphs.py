"""The graph that BERT is exported as: one run answers whatever is asked of a text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

from services.nlp.serving.encoding import CLASSES, FOLLOWS, GAPS, VECTOR
from services.nlp.training.models.bert import Bert, mean_pool
from shared.errors import ConfigurationError
from shared.training.export import PARITY_TOLERANCE, export_graph, open_session


class TypeHead(nn.Module):
    """Classes of a text, from what a BERT that stays as it is makes of it: the mean of its positions and `[CLS]`."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, classes))

    def forward(self, hidden: Tensor, present: Tensor) -> Tensor:
        """`[B, T, width]` and where there is text `[B, T]` → logits `[B, classes]`."""
        answer: Tensor = self.layers(torch.cat((mean_pool(hidden, present), hidden[:, 0]), dim=-1))
        return answer


class BertGraph(nn.Module):
    """Inputs: `tokens` and `segments` `[B, T]`; `positions` `[B, K]`, where the gaps are, any number where there are
        fewer.

    Outputs: log-probabilities `[B, K, V]` of what stands there; a unit vector `[B, width]`; the probability `[B]` that
        the second text follows the first; and, with a head, those `[B, classes]` of the classes.
    """

    def __init__(self, bert: Bert, head: TypeHead | None) -> None:
        super().__init__()
        self.bert, self.head = bert, head

    def forward(self, tokens: Tensor, segments: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        hidden, present = self.bert(tokens, segments), tokens != self.bert.config.pad
        inside = positions.clamp(0, tokens.shape[1] - 1)  # a caller's mistake must not end the run of its neighbours
        where = inside[:, :, None].expand(-1, -1, hidden.shape[-1])
        gaps = self.bert.fill(torch.gather(hidden, 1, where))
        answers = (
            torch.log_softmax(gaps, dim=-1),
            mean_pool(hidden, present),
            torch.softmax(self.bert.follows(hidden), dim=-1)[:, 1],
        )
        return (*answers, torch.softmax(self.head(hidden, present), dim=-1)) if self.head else answers


def export_bert(bert: Bert, head: TypeHead | None, path: Path) -> None:
    """Writes the graph."""
    batch, length, gaps = (torch.export.Dim(name, min=1) for name in ("batch", "length", "gaps"))
    export_graph(
        BertGraph(bert, head).eval(),
        bert_examples(bert, rows=2, length=7, gaps=3),
        ({0: batch, 1: length}, {0: batch, 1: length}, {0: batch, 1: gaps}),
        path,
        input_names=["tokens", "segments", "positions"],
        output_names=[GAPS, VECTOR, FOLLOWS, *([CLASSES] if head else [])],
    )


def bert_examples(bert: Bert, *, rows: int, length: int, gaps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random inputs; every row but the first ends with padding."""
    tokens = torch.randint(5, bert.config.vocabulary, (rows, length))
    tokens[1:, length - length // 3 :] = bert.config.pad
    return tokens, torch.randint(2, (rows, length)), torch.randint(length, (rows, gaps))


def check_bert(bert: Bert, head: TypeHead | None, path: Path) -> float:
    """Largest difference between the graph and PyTorch, over several numbers of rows, pieces and gaps.

    Raises:
        ConfigurationError: it is above PARITY_TOLERANCE; the export is wrong.
    """
    session = open_session(path)
    graph, worst = BertGraph(bert, head).eval(), 0.0
    with torch.inference_mode():
        context = bert.config.context
        for rows, length, gaps in ((1, context // 8, 1), (3, context // 3, 4), (5, context, 16)):
            inputs = bert_examples(bert, rows=rows, length=length, gaps=gaps)
            feeds = {entry.name: tensor.numpy() for entry, tensor in zip(session.get_inputs(), inputs, strict=True)}
            for one, other in zip(graph(*inputs), session.run(None, feeds), strict=True):
                worst = max(worst, float(np.abs(one.numpy() - other).max()))
    if not worst <= PARITY_TOLERANCE:
        raise ConfigurationError(f"the exported graph differs from PyTorch by {worst:.2e}")
    return worst


def onnx_measures(session: ort.InferenceSession, parts: list[tuple[np.ndarray, ...]]) -> dict[str, float]:
    """`nats` and `accuracy` of gaps, as `train_bert.measure`.

    Args:
        session: the graph.
        parts: tokens, segments and targets `[B, T]`, targets negative where there is no gap.
    """
    loss = right = count = 0.0
    for tokens, segments, targets in parts:
        rows = [np.flatnonzero(row >= 0) for row in targets]
        positions = np.zeros((len(rows), max(1, *(len(row) for row in rows))), np.int64)
        for index, row in enumerate(rows):
            positions[index, : len(row)] = row
        feeds = {"tokens": tokens, "segments": segments, "positions": positions}
        found = session.run([GAPS], feeds)[0]
        for index, row in enumerate(rows):
            answers = targets[index, row]
            loss -= float(found[index, np.arange(len(row)), answers].sum(dtype=np.float64))
            right += float((found[index, : len(row)].argmax(-1) == answers).sum())
            count += len(row)
    return {"nats": loss / count, "accuracy": right / count}


def onnx_follows(session: ort.InferenceSession, parts: list[tuple[np.ndarray, ...]]) -> float:
    """Accuracy of next sentences over (tokens, segments, labels `[B]`)."""
    right = count = 0
    for tokens, segments, labels in parts:
        feeds = {"tokens": tokens, "segments": segments, "positions": np.zeros((len(tokens), 1), np.int64)}
        right += int(((session.run([FOLLOWS], feeds)[0] > 0.5) == labels).sum())
        count += len(labels)
    return right / count
