"""Measures the variants of an exported translator: BLEU on dev by the search that serving uses, and times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.nlp.preprocess import join_japanese
from services.nlp.serving.search import SearchSettings
from services.nlp.tokenizers.vocabularies import Vocabularies
from services.nlp.training.bleu import corpus_bleu
from services.nlp.training.data import load_pairs
from services.nlp.training.offline import OnnxTranslator
from services.nlp.training.publishing import VARIANTS
from services.nlp.training.translator_graphs import Feeds
from shared.training.latency import Latency, measure_latencies

LATENCY_SENTENCES = 60
GREEDY = SearchSettings(beam=1)


@dataclass(frozen=True)
class Candidate:
    """One variant of both graphs with all that was measured on it."""

    encoder: Path
    step: Path
    quality: dict[str, float]
    encoder_latency: Latency
    step_latency: Latency
    whole_ms: tuple[float, float]
    """50th and 95th percentile of a whole translation."""


def measure_variants(folder: Path, vocabularies: Vocabularies, served: SearchSettings) -> dict[str, Candidate]:
    """BLEU on dev and times of every variant; times in turns, on one thread.

    Args:
        folder: with the graphs of every variant.
        vocabularies: of the translator.
        served: the search that serving uses when a request asks for nothing else.
    """
    paths = {name: (folder / f"encoder.{file}", folder / f"step.{file}") for name, file in VARIANTS.items()}
    translators = {name: OnnxTranslator.open(*pair, vocabularies) for name, pair in paths.items()}
    encoder = measure_latencies({n: _encode(t) for n, t in translators.items()}, np.zeros((1, 12), np.float32))
    step = measure_latencies({n: _step(t) for n, t in translators.items()}, np.zeros((1, 1), np.float32))
    whole = _whole_times(translators, served)
    return {
        name: Candidate(*paths[name], _quality(translator, served), encoder[name], step[name], whole[name])
        for name, translator in translators.items()
    }


def _encode(translator: OnnxTranslator) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    def predict(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(translator.encoder.run(None, {"source": batch.astype(np.int64) + 5})[0])

    return predict


def _step(translator: OnnxTranslator) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    made: dict[int, Feeds] = {}

    def predict(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        feeds = made.setdefault(len(batch), _step_feeds(translator, len(batch)))
        return np.asarray(translator.step.run(["log_probabilities"], feeds)[0])

    return predict


def _step_feeds(translator: OnnxTranslator, rows: int, length: int = 16) -> Feeds:
    """A step in the middle of sentences of the corpus' length."""
    feeds: Feeds = {}
    for entry in translator.step.get_inputs():
        if len(entry.shape) == 1:
            feeds[entry.name] = np.full(rows, length - 1, np.int64)
        elif len(entry.shape) == 2:
            feeds[entry.name] = np.ones((rows, entry.shape[1]), np.float32)
        else:
            feeds[entry.name] = np.ones((rows, entry.shape[1], length, entry.shape[3]), np.float32)
    return feeds


def _whole_times(translators: dict[str, OnnxTranslator], served: SearchSettings) -> dict[str, tuple[float, float]]:
    """Milliseconds of whole translations of dev sentences, 50th and 95th percentile."""
    sentences = load_pairs("dev").english[:LATENCY_SENTENCES]
    turn = iter(range(10**9))

    def whole(translator: OnnxTranslator) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        def predict(batch: NDArray[np.float32]) -> NDArray[np.float32]:
            translator.translate([sentences[next(turn) // len(translators) % len(sentences)]], served)
            return batch

        return predict

    times = measure_latencies(
        {name: whole(translator) for name, translator in translators.items()},
        np.zeros((1, 1), np.float32),
        rounds=LATENCY_SENTENCES,
        batch_rounds=1,
    )
    return {name: (latency.p50_ms, latency.p95_ms) for name, latency in times.items()}


def _quality(translator: OnnxTranslator, served: SearchSettings) -> dict[str, float]:
    dev = load_pairs("dev")
    words = [translator.words(found) for found in translator.translate(dev.english, served)]
    bleu = corpus_bleu(words, dev.japanese)
    return {
        "bleu": bleu.score,
        "bleu_greedy": translator.bleu(dev, GREEDY),
        "brevity_penalty": bleu.brevity_penalty,
        **character_scores([join_japanese(w) for w in words], [join_japanese(w) for w in dev.japanese]),
        "test_sentences": float(len(dev)),
    }


def character_scores(translations: list[str], references: list[str]) -> dict[str, float]:
    """sacreBLEU over characters and chrF of joined text, as others report them."""
    import sacrebleu

    return {
        "sacrebleu_characters": sacrebleu.corpus_bleu(translations, [references], tokenize="char").score,
        "chrf": sacrebleu.corpus_chrf(translations, [references]).score,
    }
