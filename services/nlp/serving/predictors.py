"""Predictors of the nlp service: text in, text out; no protobuf."""

from __future__ import annotations

import time
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from services.nlp.preprocess import join_japanese, split_english
from services.nlp.serving.config import NlpConfig
from services.nlp.serving.decoding import Decoding, DecodingLoops
from services.nlp.serving.search import BeamSearch, Floats, Found, SearchSettings
from services.nlp.tokenizers.special import EOS, PAD, SPECIAL_PIECES, UNK
from services.nlp.tokenizers.vocabularies import Vocabularies
from shared.artifacts import Manifest
from shared.errors import InvalidInput, ModelUnavailable
from shared.serving.engine import Engine
from shared.serving.served import Served

TRANSLATION = "translation"
VOCABULARIES = "vocabularies.json"
"""The asset of a translator that holds its two vocabularies."""
ATTENTION = "attention"
"""Output of a step that says where it looked, `[rows, layers, heads, S]`; not every translator has it."""
STEP_SUFFIX = "-step"
"""A translator's decoder is the model of its name with this behind; it makes one step."""
DEFAULT_BEAM, MAX_BEAM, MAX_TOKENS, MAX_PENALTY = 4, 16, 200, 2.0
DEFAULT_PENALTY = 1.3
"""Of 0.6 to 2, the best on the held-back pairs: 0.6 translates too briefly, above 1.5 it turns over (docs/log.md)."""
PENALTY = "length_penalty"
"""Where a translator's manifest names its own, in `preprocessing`."""
LENGTH_STEP = 4
"""Sentences are padded to a multiple of this many pieces, so that more of them share a run of the encoder."""


@dataclass(frozen=True)
class TranslateQuery:
    """What to translate and how; empty strings mean the default model, the newest version, the variant `auto`."""

    text: str
    model: str = ""
    version: str = ""
    variant: str = ""
    beam: int | None = None
    n_best: int | None = None
    max_tokens: int | None = None
    length_penalty: float | None = None
    attention: bool = False
    deadline: float = float("inf")


@dataclass(frozen=True)
class Translation:
    """One translation; `attention` `[tokens (+1 if finished), S]` only if asked for."""

    text: str
    words: list[str]
    tokens: list[str]
    score: float
    log_probability: float
    finished: bool
    attention: Floats | None


@dataclass(frozen=True)
class Source:
    """A sentence as a model reads it."""

    words: list[str]
    ids: list[int]
    tokens: list[str]
    unknown_words: list[str]


@dataclass(frozen=True)
class TranslateAnswer:
    """The best translations, best first, and how they came about; times in seconds."""

    translations: list[Translation]
    source: Source
    steps: int
    model: str
    version: str
    variant: str
    batch_size: int
    queue_seconds: float
    preprocess_seconds: float
    infer_seconds: float
    postprocess_seconds: float


class Translator:
    """Translates with any model of the repository whose task is translation."""

    def __init__(self, engine: Engine, config: NlpConfig) -> None:
        self._engine = engine
        self._config = config
        self._loops = DecodingLoops()
        self._vocabularies: WeakKeyDictionary[Served, Vocabularies] = WeakKeyDictionary()

    async def translate(self, query: TranslateQuery) -> TranslateAnswer:
        """Reads, encodes, searches and writes one sentence.

        Raises:
            InvalidInput: the text or a setting, or attention is wanted of a model without it.
            ModelNotFound: model, version or variant.
            ModelUnavailable: the model is broken, unloaded or no translator.
            Overloaded: the model's queue is full.
            DeadlinePassed: before the translation was complete.
        """
        self._check_text(query.text)
        check_search(query)
        name = query.model or self._config.default_translator
        models = self._engine.models
        async with models.acquire(name, query.version, query.variant) as encoder:
            _check_task(encoder)
            async with models.acquire(name + STEP_SUFFIX, encoder.version, encoder.variant) as step:
                _check_attention(query, name, step)
                with encoder.batcher.admit(), step.batcher.admit():
                    return await self._translate(name, query, encoder, step)

    async def _translate(self, name: str, query: TranslateQuery, encoder: Served, step: Served) -> TranslateAnswer:
        source, preprocess_seconds = await self._engine.offload(lambda: self._read(query.text, encoder), query.deadline)
        encoder.observer.preprocess.observe(preprocess_seconds)
        encoded = await encoder.batcher.submit({"source": padded(source.ids)}, query.deadline)
        read = {spec.name for spec in step.manifest.inputs}
        memory = {key: value for key, value in encoded.outputs.items() if key in read}
        settings = search_settings(query, len(source.ids), own_penalty(encoder.manifest))
        search = BeamSearch(settings, keeps_attention=query.attention)
        decoding = Decoding(search, memory, len(source.ids), deadline=query.deadline)
        await self._loops.of(step).run(decoding)
        started = time.perf_counter()
        vocabularies = self._vocabularies[encoder]
        translations = [_write(found, vocabularies) for found in search.best(query.n_best or 1)]
        postprocess_seconds = time.perf_counter() - started
        encoder.observer.postprocess.observe(postprocess_seconds)
        return TranslateAnswer(
            translations=translations,
            source=source,
            steps=decoding.steps,
            model=name,
            version=encoder.version,
            variant=encoder.variant,
            batch_size=decoding.batch_size,
            queue_seconds=encoded.queue_seconds + decoding.queue_seconds,
            preprocess_seconds=preprocess_seconds,
            infer_seconds=encoded.infer_seconds + decoding.infer_seconds,
            postprocess_seconds=postprocess_seconds,
        )

    def _check_text(self, text: str) -> None:
        most = self._config.max_text_characters
        if len(text) > most:
            raise InvalidInput(
                "text",
                f"has {len(text)} characters, expected at most {most}; send it sentence by sentence",
                reason="TEXT_TOO_LONG",
            )

    def _read(self, text: str, encoder: Served) -> Source:
        vocabularies = self._vocabularies.get(encoder)
        if vocabularies is None:
            vocabularies = Vocabularies.from_json(encoder.assets[VOCABULARIES].decode())
            self._vocabularies[encoder] = vocabularies
        return read_source(text, vocabularies)


def read_source(text: str, vocabularies: Vocabularies) -> Source:
    """A sentence as a model reads it.

    Raises:
        InvalidInput: it has no words, or too many pieces.
    """
    words = split_english(text)
    if not words:
        raise InvalidInput("text", "holds no words, expected an English sentence", reason="TEXT_EMPTY")
    english = vocabularies.english
    ids = [*english.encode(words), EOS]
    if len(ids) - 1 > MAX_TOKENS:
        raise InvalidInput(
            "text",
            f"has {len(ids) - 1} pieces, expected at most {MAX_TOKENS}; send it sentence by sentence",
            reason="TEXT_TOO_LONG",
        )
    unknown = [word for word in dict.fromkeys(words) if UNK in english.encode([word])]
    tokens = [piece for word in words for piece in english.split(word)]
    return Source(words, ids, [*tokens, SPECIAL_PIECES[EOS]], unknown)


def padded(ids: list[int]) -> np.ndarray:
    """`[1, S]` int64, PAD at the end to a multiple of LENGTH_STEP."""
    array = np.full((1, -(-len(ids) // LENGTH_STEP) * LENGTH_STEP), PAD, np.int64)
    array[0, : len(ids)] = ids
    return array


def check_search(query: TranslateQuery) -> None:
    """Raises InvalidInput if a setting of the search is out of its range."""
    beam = DEFAULT_BEAM if query.beam is None else query.beam
    _check_range("beam", query.beam, 1, MAX_BEAM)
    _check_range("n_best", query.n_best, 1, beam)
    _check_range("max_tokens", query.max_tokens, 1, MAX_TOKENS)
    penalty = query.length_penalty
    if penalty is not None and not 0 <= penalty <= MAX_PENALTY:  # also not a number
        raise InvalidInput("length_penalty", f"is {penalty:g}, expected 0 to {MAX_PENALTY:g}")


def _check_range(field: str, value: int | None, least: int, most: int) -> None:
    if value is not None and not least <= value <= most:
        raise InvalidInput(field, f"is {value}, expected {least} to {most}")


def own_penalty(manifest: Manifest) -> float:
    """The length penalty of a translator, where a query has none: its own if its manifest names one."""
    return float(manifest.preprocessing.get(PENALTY, DEFAULT_PENALTY))


def search_settings(query: TranslateQuery, source_length: int, penalty: float) -> SearchSettings:
    """The search that a query asks for; `penalty` is the model's own."""
    return SearchSettings(
        beam=query.beam or DEFAULT_BEAM,
        max_tokens=query.max_tokens or min(MAX_TOKENS, 2 * source_length + 10),
        length_penalty=penalty if query.length_penalty is None else query.length_penalty,
    )


def _check_attention(query: TranslateQuery, name: str, step: Served) -> None:
    if query.attention and ATTENTION not in {spec.name for spec in step.manifest.outputs}:
        raise InvalidInput(
            "attention",
            f"is wanted of {name}, whose decoder has one state of the whole sentence and looks nowhere; drop it, or "
            "ask another translator",
            reason="NO_ATTENTION",
        )


def _check_task(encoder: Served) -> None:
    manifest = encoder.manifest
    if manifest.task != TRANSLATION or VOCABULARIES not in encoder.assets:
        raise ModelUnavailable(f"model {manifest.name} does {manifest.task}, not {TRANSLATION}")


def _write(found: Found, vocabularies: Vocabularies) -> Translation:
    words = vocabularies.japanese.decode(found.tokens)
    return Translation(
        text=join_japanese(words),
        words=words,
        tokens=[vocabularies.japanese.pieces[index] for index in found.tokens],
        score=found.score,
        log_probability=found.log_probability,
        finished=found.finished,
        attention=np.stack(found.attention) if found.attention else None,
    )
