"""Predictors that read a text in both directions and answer in one run: gaps, vectors, classes, next sentences.

What a model can do is told by its graph's outputs, so one BERT serves four RPCs, and a sentence encoder one. All take
the same way: words, pieces, rows padded to a length that others share, the batcher.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from services.nlp.preprocess import split_bert, split_english
from services.nlp.serving.config import NlpConfig
from services.nlp.tokenizers.wordpiece import MASK, UNK, WordPieceTokenizer
from shared.artifacts import Manifest
from shared.errors import InvalidInput, ModelUnavailable
from shared.serving.batching import BatchResult
from shared.serving.engine import Engine
from shared.serving.served import Served
from shared.serving.session import Array

GAPS, VECTOR, CLASSES, FOLLOWS = "log_probabilities", "sentence_vector", "class_probabilities", "follows"
"""Outputs of graphs, each with the RPC that needs it."""
VOCABULARY = "vocabulary.json"
LENGTH_STEP = 16
"""Rows are padded to a multiple of it, so that texts of like length share a run."""
GAP_ROOM = (1, 4, 16, 64, 128)
"""How many gaps a row may have room for."""
DEFAULT_CANDIDATES, MAX_CANDIDATES = 5, 100
SPLITTERS: dict[str, Callable[[str], list[str]]] = {"corpus": split_english, "bert": split_bert}
"""How a model's text is cut into words: `preprocessing.words` of its manifest."""
_GAP = re.compile(re.escape(MASK), re.IGNORECASE)

Floats = npt.NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True)
class ModelChoice:
    """Who shall answer, and until when; empty strings mean the default model, the newest version, `auto`."""

    model: str = ""
    version: str = ""
    variant: str = ""
    deadline: float = float("inf")


@dataclass(frozen=True)
class Candidate:
    """What may stand in a gap."""

    piece: str
    probability: float


@dataclass(frozen=True)
class Filled:
    """Candidates for each gap, and the text with the best ones."""

    gaps: list[list[Candidate]]
    text: str


@dataclass(frozen=True)
class Row:
    """A text, or two, as a model reads them."""

    ids: list[int]
    segments: list[int]
    pieces: list[str]
    unknown_words: list[str]
    gaps: list[int]
    """Where its gaps are."""


@dataclass(frozen=True)
class Encoded(Generic[T]):
    """An answer and how it came about; times in seconds."""

    value: T
    row: Row
    model: str
    version: str
    variant: str
    batch_size: int
    queue_seconds: float
    preprocess_seconds: float
    infer_seconds: float
    postprocess_seconds: float


class TextEncoder:
    """Asks any model of the repository that reads a text as a whole."""

    def __init__(self, engine: Engine, config: NlpConfig) -> None:
        self._engine = engine
        self._config = config
        self._tokenizers: WeakKeyDictionary[Served, WordPieceTokenizer] = WeakKeyDictionary()

    async def fill(self, text: str, top_k: int | None, choice: ModelChoice) -> Encoded[Filled]:
        """What stands in the gaps of a text.

        Raises:
            InvalidInput: the text, that it has no gap, or top_k.
            ModelNotFound: model, version or variant.
            ModelUnavailable: the model is broken, unloaded or fills no gaps.
            Overloaded: the model's queue is full.
            DeadlinePassed: before the work began.
        """
        _check_count("top_k", top_k, MAX_CANDIDATES)
        if text.strip() and not _GAP.search(text):
            raise InvalidInput("text", f"has no {MASK}, expected one for each gap", reason="MASK_MISSING")

        def read(tokenizer: WordPieceTokenizer, result: BatchResult, row: Row) -> Filled:
            rows = result.outputs[GAPS][0, : len(row.gaps)]
            return fill_gaps(rows, row, tokenizer, top_k or DEFAULT_CANDIDATES)

        return await self._answer({"text": text}, choice, self._config.default_masked_model, GAPS, read)

    async def embed(self, text: str, choice: ModelChoice) -> Encoded[Floats]:
        """The vector of a text `[W]`; raises as `fill`."""

        def read(tokenizer: WordPieceTokenizer, result: BatchResult, row: Row) -> Floats:
            vector: Floats = result.outputs[VECTOR][0]
            return vector

        return await self._answer({"text": text}, choice, self._config.default_encoder, VECTOR, read)

    async def classify(self, text: str, top_k: int | None, choice: ModelChoice) -> Encoded[list[tuple[str, float]]]:
        """The classes of a text, most probable first; raises as `fill`."""

        def rank(probabilities: Floats, labels: Sequence[str]) -> list[tuple[str, float]]:
            order = np.argsort(-probabilities, kind="stable")[:top_k]
            return [(labels[index], float(probabilities[index])) for index in order]

        name = choice.model or self._config.default_text_classifier
        async with self._engine.models.acquire(name, choice.version, choice.variant) as served:
            labels = served.manifest.labels
            self._tokenizer(served, CLASSES)
            _check_count("top_k", top_k, len(labels))

            def read(tokenizer: WordPieceTokenizer, result: BatchResult, row: Row) -> list[tuple[str, float]]:
                return rank(result.outputs[CLASSES][0], labels)

            return await self._run({"text": text}, name, served, choice.deadline, CLASSES, read)

    async def follows(self, first: str, second: str, choice: ModelChoice) -> Encoded[float]:
        """The probability that one text follows another; raises as `fill`."""

        def read(tokenizer: WordPieceTokenizer, result: BatchResult, row: Row) -> float:
            return float(result.outputs[FOLLOWS][0])

        texts = {"first": first, "second": second}
        return await self._answer(texts, choice, self._config.default_masked_model, FOLLOWS, read)

    async def _answer(
        self,
        texts: dict[str, str],
        choice: ModelChoice,
        default: str,
        output: str,
        read: Callable[[WordPieceTokenizer, BatchResult, Row], T],
    ) -> Encoded[T]:
        name = choice.model or default
        async with self._engine.models.acquire(name, choice.version, choice.variant) as served:
            return await self._run(texts, name, served, choice.deadline, output, read)

    async def _run(
        self,
        texts: dict[str, str],
        name: str,
        served: Served,
        deadline: float,
        output: str,
        read: Callable[[WordPieceTokenizer, BatchResult, Row], T],
    ) -> Encoded[T]:
        self._check_texts(texts)
        tokenizer = self._tokenizer(served, output)
        with served.batcher.admit():
            row, preprocess_seconds = await self._engine.offload(
                lambda: read_row(texts, tokenizer, served.manifest.preprocessing), deadline
            )
            served.observer.preprocess.observe(preprocess_seconds)
            feeds = row_feeds(row, tokenizer.pad, served.manifest)
            result = await served.batcher.submit(feeds, deadline)
        started = time.perf_counter()
        value = read(tokenizer, result, row)
        postprocess_seconds = time.perf_counter() - started
        served.observer.postprocess.observe(postprocess_seconds)
        return Encoded(
            value,
            row,
            model=name,
            version=served.version,
            variant=served.variant,
            batch_size=result.batch_size,
            queue_seconds=result.queue_seconds,
            preprocess_seconds=preprocess_seconds,
            infer_seconds=result.infer_seconds,
            postprocess_seconds=postprocess_seconds,
        )

    def _check_texts(self, texts: dict[str, str]) -> None:
        most = self._config.max_text_characters
        for field, text in texts.items():
            if not text.strip():
                raise InvalidInput(field, "is empty, expected text", reason="TEXT_EMPTY")
            if len(text) > most:
                raise InvalidInput(
                    field, f"has {len(text)} characters, expected at most {most}", reason="TEXT_TOO_LONG"
                )

    def _tokenizer(self, served: Served, output: str) -> WordPieceTokenizer:
        """The vocabulary of a leased model; raises ModelUnavailable if it does not give `output`."""
        manifest = served.manifest
        if VOCABULARY not in served.assets or all(spec.name != output for spec in manifest.outputs):
            raise ModelUnavailable(f"model {manifest.name} does {manifest.task}; its graph gives no `{output}`")
        tokenizer = self._tokenizers.get(served)
        if tokenizer is None:
            tokenizer = WordPieceTokenizer.from_json(served.assets[VOCABULARY].decode())
            self._tokenizers[served] = tokenizer
        return tokenizer


def read_row(texts: dict[str, str], tokenizer: WordPieceTokenizer, preprocessing: Mapping[str, Any]) -> Row:
    """`[CLS] first [SEP]` or `[CLS] first [SEP] second [SEP]` as a model reads it.

    Args:
        texts: one or two, by the field that they came in.
        tokenizer: the model's.
        preprocessing: of its manifest: `context`, how many pieces it sees, and `words`, one of SPLITTERS.

    Raises:
        InvalidInput: a text has no words, or they have more pieces than the model sees.
    """
    split = SPLITTERS[preprocessing["words"]]
    ids, segments, unknown = [tokenizer.cls], [0], dict[str, None]()
    for segment, (field, text) in enumerate(texts.items()):
        words = split_with_gaps(text, split)
        if not words:
            raise InvalidInput(field, "holds no words, expected text", reason="TEXT_EMPTY")
        own = [id_ for word in words for id_ in ([tokenizer.mask] if word == MASK else tokenizer.encode([word]))]
        unknown |= dict.fromkeys(word for word in words if word != MASK and tokenizer.split(word) == (UNK,))
        ids += [*own, tokenizer.sep]
        segments += [segment] * (len(own) + 1)
    most = int(preprocessing["context"]) - 1 - len(texts)
    if len(ids) - 1 - len(texts) > most:
        field = next(reversed(texts))
        problem = f"has {len(ids) - 1 - len(texts)} pieces{' with the text before it' if len(texts) > 1 else ''}"
        raise InvalidInput(field, f"{problem}, expected at most {most}; send it in parts", reason="TEXT_TOO_LONG")
    gaps = [at for at, id_ in enumerate(ids) if id_ == tokenizer.mask]
    return Row(ids, segments, [tokenizer.pieces[id_] for id_ in ids], list(unknown), gaps)


def split_with_gaps(text: str, split: Callable[[str], list[str]]) -> list[str]:
    """The words of a text; each gap is a word of its own."""
    words: list[str] = []
    for number, part in enumerate(_GAP.split(text)):
        words += [MASK] if number else []
        words += split(part)
    return words


def row_feeds(row: Row, pad: int, manifest: Manifest) -> dict[str, Array]:
    """The inputs of a model's graph for one row: those of `tokens`, `segments` and `positions` (gaps) that it has."""
    whole = -(-len(row.ids) // LENGTH_STEP) * LENGTH_STEP
    length = min(whole, int(manifest.preprocessing["context"]))
    room = next(size for size in GAP_ROOM if size >= len(row.gaps))
    feeds = {
        "tokens": _filled(row.ids, length, pad),
        "segments": _filled(row.segments, length, 0),
        "positions": _filled(row.gaps, room, 0),
    }
    return {spec.name: feeds[spec.name] for spec in manifest.inputs}


def _filled(values: Sequence[int], length: int, fill: int) -> Array:
    array = np.full((1, length), fill, np.int64)
    array[0, : len(values)] = values
    return array


def fill_gaps(log_probabilities: Floats, row: Row, tokenizer: WordPieceTokenizer, count: int) -> Filled:
    """The candidates for each gap.

    Args:
        log_probabilities: `[gaps, V]`.
        row: what was read.
        tokenizer: of the model.
        count: candidates of a gap.
    """
    scores = log_probabilities.copy()
    scores[:, sorted(tokenizer.special)] = -np.inf
    best = np.argsort(-scores, axis=1, kind="stable")[:, : min(count, scores.shape[1] - len(tokenizer.special))]
    probabilities = np.exp(log_probabilities)
    gaps = [
        [Candidate(tokenizer.pieces[index], float(probabilities[gap, index])) for index in best[gap]]
        for gap in range(len(best))
    ]
    ids = list(row.ids)
    for gap, at in enumerate(row.gaps):
        ids[at] = int(best[gap, 0])
    return Filled(gaps, " ".join(tokenizer.decode(ids)))


def _check_count(field: str, value: int | None, most: int) -> None:
    if value is not None and not 1 <= value <= most:
        raise InvalidInput(field, f"is {value}, expected 1 to {most}")
