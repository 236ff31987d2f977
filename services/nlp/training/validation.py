"""Scores of a network's own translations, before it is exported."""

from __future__ import annotations

import torch
from torch import nn

from services.nlp.tokenizers.special import EOS
from services.nlp.tokenizers.vocabularies import Vocabularies
from services.nlp.training.bleu import corpus_bleu
from services.nlp.training.data import Pairs, encode_pairs, padded, shifted
from services.nlp.training.decode import greedy
from services.nlp.training.networks import Network
from shared.training.loop import Score

MAX_PIECES = 60
"""Longest translation in validation, in pieces; the corpus has at most 16 words a sentence."""
REPORT_PIECES = 20
"""Longest translation in the report's test."""


class BleuValidator:
    """Scores a model by the BLEU of its own greedy translations of held-back pairs."""

    def __init__(self, pairs: Pairs, vocabularies: Vocabularies) -> None:
        self.pairs, self.vocabularies = pairs, vocabularies
        self.encoded = encode_pairs(pairs, vocabularies)

    def __call__(self, model: nn.Module) -> Score:
        """BLEU in percent; beside it, for comparison only, that of teacher-forced tokens."""
        assert isinstance(model, Network)
        found = greedy(model, self.encoded.source, MAX_PIECES)
        bleu = corpus_bleu([self.vocabularies.japanese.decode(ids) for ids in found], self.pairs.japanese)
        forced = self.forced(model)
        return Score(bleu.score, {"val_bleu": round(bleu.score, 3), "val_forced_bleu": round(forced, 3)})

    def as_reported(self, model: Network) -> float:
        """BLEU as the report counts it: 20 steps of greedy search, an unknown word matches an unknown word."""
        return self.of_ids(greedy(model, self.encoded.source, REPORT_PIECES))

    @torch.inference_mode()
    def forced(self, model: Network) -> float:
        """BLEU of the most probable token after each right prefix: what the report called its validation score."""
        found: list[list[int]] = []
        for start in range(0, len(self.pairs), 64):
            target = padded(self.encoded.target[start : start + 64])
            ids = model((padded(self.encoded.source[start : start + 64]), shifted(target))).argmax(-1).tolist()
            found += [row[: row.index(EOS)] if EOS in row else row for row in ids]
        return self.of_ids(found)

    def of_ids(self, found: list[list[int]]) -> float:
        """BLEU of ids, those of unknown words among them."""
        words = [self.vocabularies.japanese.decode(ids) for ids in found]
        known = [self.vocabularies.japanese.decode(ids) for ids in self.encoded.target]
        return corpus_bleu(words, known, unknown_matches=True).score
