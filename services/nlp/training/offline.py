"""Translates many sentences with exported graphs, by the very search and batch that serving uses, without a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from services.nlp.serving.decoding import CROSS, Decoding, DecodingBatch
from services.nlp.serving.predictors import padded
from services.nlp.serving.search import BeamSearch, Found, SearchSettings
from services.nlp.tokenizers.special import EOS
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
        cross = {name: np.asarray(value) for name, value in zip(names, outputs, strict=True) if name.startswith(CROSS)}
        return Decoding(BeamSearch(settings), cross, len(ids))

    def _inputs(self) -> list[TensorSpec]:
        return [
            TensorSpec(value.name, "", tuple(-1 if isinstance(size, str) else size for size in value.shape))
            for value in self.step.get_inputs()
        ]
