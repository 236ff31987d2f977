"""Exported graphs without a server: translating by the very search and batch that serving uses, and scoring text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from services.nlp.serving.decoding import Decoding, DecodingBatch
from services.nlp.serving.predictors import padded
from services.nlp.serving.sampling import FIRST_PIECE
from services.nlp.serving.search import BeamSearch, Found, SearchSettings
from services.nlp.tokenizers.special import EOS, SPECIAL_PIECES
from services.nlp.tokenizers.texts import TextTokenizer
from services.nlp.tokenizers.vocabularies import Vocabularies
from services.nlp.training.bleu import corpus_bleu
from services.nlp.training.data import Pairs
from shared.artifacts import TensorSpec
from shared.training.export import open_session

ROWS = 64
"""Rows of a step at most."""


@dataclass(frozen=True)
class OnnxTranslator:
    """A translator's two graphs and its vocabularies."""

    encoder: ort.InferenceSession
    step: ort.InferenceSession
    vocabularies: Vocabularies

    @classmethod
    def open(cls, encoder: Path, step: Path, vocabularies: Vocabularies) -> OnnxTranslator:
        """Opens both graphs with one thread each."""
        return cls(open_session(encoder), open_session(step), vocabularies)

    def translate(self, sentences: Sequence[Sequence[str]], settings: SearchSettings) -> list[Found]:
        """The best translation of each sentence, given as words."""
        batch = DecodingBatch(self._inputs())
        names = [output.name for output in self.step.get_outputs()]
        decodings = [self._encode(words, settings) for words in sentences]
        waiting = sorted(decodings, key=lambda decoding: -decoding.source_length)
        while waiting or batch.running:
            while waiting and (not batch.running or batch.reserved + settings.beam <= ROWS):
                batch.add(waiting.pop())
            outputs = self.step.run(names, batch.feeds())
            batch.settle(dict(zip(names, outputs, strict=True)))
        return [decoding.search.best(1)[0] for decoding in decodings]

    def words(self, found: Found) -> list[str]:
        """The words of a translation."""
        return self.vocabularies.japanese.decode(found.tokens)

    def bleu(self, pairs: Pairs, settings: SearchSettings) -> float:
        """BLEU in percent of the translations of pairs."""
        found = self.translate(pairs.english, settings)
        return corpus_bleu([self.words(one) for one in found], pairs.japanese).score

    def _encode(self, words: Sequence[str], settings: SearchSettings) -> Decoding:
        ids = [*self.vocabularies.english.encode(words), EOS]
        names = [output.name for output in self.encoder.get_outputs()]
        outputs = self.encoder.run(names, {"source": padded(ids)})
        memory = {name: np.asarray(value) for name, value in zip(names, outputs, strict=True)}
        return Decoding(BeamSearch(settings), memory, len(ids))

    def _inputs(self) -> list[TensorSpec]:
        return [
            TensorSpec(value.name, "", tuple(-1 if isinstance(size, str) else size for size in value.shape))
            for value in self.step.get_inputs()
        ]


def onnx_held_out_loss(
    session: ort.InferenceSession, tokenizer: TextTokenizer, text: str, context: int, batch: int = 32
) -> float:
    """Nats a character over a whole text: windows move by half a context, and only their second half counts."""
    half, ids = context // 2, np.array(tokenizer.encode(text), np.int64)
    special = len(SPECIAL_PIECES)
    lengths = np.array([1] * special + [len(piece) for piece in tokenizer.pieces[special:]])
    starts = np.arange(0, len(ids) - context - 1, half)
    total, count = 0.0, 0
    for at in range(0, len(starts), batch):
        rows = ids[starts[at : at + batch, None] + np.arange(context + 1)]
        log_probabilities = session.run(["log_probabilities"], reading_feeds(session, rows[:, :-1]))[0][:, half:]
        chosen = np.take_along_axis(log_probabilities, rows[:, 1 + half :, None], axis=-1)
        total -= float(chosen.sum(dtype=np.float64))
        count += int(lengths[rows[:, 1 + half :]].sum())
    return total / count


def onnx_predictor(session: ort.InferenceSession) -> Callable[[NDArray[np.int64]], NDArray[np.int64]]:
    """What greedy search would write after each token of `[B, T]`."""

    def predict(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        log_probabilities = session.run(["log_probabilities"], reading_feeds(session, tokens))[0]
        found: NDArray[np.int64] = FIRST_PIECE + log_probabilities[..., FIRST_PIECE:].argmax(-1)
        return found

    return predict


def reading_feeds(session: ort.InferenceSession, tokens: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """The inputs that read `tokens` `[B, Q]` from the beginning."""
    feeds: dict[str, NDArray[Any]] = {"tokens": tokens, "position": np.zeros(len(tokens), np.int64)}
    for entry in session.get_inputs():
        if len(entry.shape) == 4:
            feeds[entry.name] = np.zeros((len(tokens), entry.shape[1], 1, entry.shape[3]), np.float32)
    return feeds
