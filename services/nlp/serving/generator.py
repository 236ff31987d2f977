"""Predictors that continue and score text with a language model; no protobuf.

A prompt is read in one run of the graph, which can read several positions at once. Then the text steps together with
those of all other callers (decoding.py). A model sees `context` positions: when they are full, the last half of the
text is read again and becomes the first half of a new window.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np

from services.nlp.serving.config import NlpConfig
from services.nlp.serving.decoding import NEW, DecodingLoops, Start, StepRun
from services.nlp.serving.habits import DEFAULT_TEMPERATURE, ModelHabits
from services.nlp.serving.sampling import FIRST_PIECE, Sampler, SamplingSettings, StopStrings
from services.nlp.serving.search import Floats, Next
from services.nlp.tokenizers.texts import TextTokenizer, read_text_tokenizer
from shared.errors import InvalidInput, ModelUnavailable
from shared.serving.engine import Engine
from shared.serving.served import Served
from shared.serving.session import Array

GENERATION = "text-generation"
VOCABULARY = "vocabulary.json"
"""The asset of a language model that holds its characters or pieces."""
MAX_TOKENS, MAX_ALTERNATIVES, MAX_STOPS, MAX_STOP_CHARACTERS = 2000, 10, 8, 64
MAX_TEMPERATURE, MAX_TOP_K = 5.0, 10_000

Finish = Literal["length", "stop"]


@dataclass(frozen=True)
class GenerateQuery:
    """What to continue and how; empty strings mean the default model, the newest version, the variant `auto`."""

    prompt: str
    model: str = ""
    version: str = ""
    variant: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    alternatives: int = 0
    deadline: float = float("inf")

    def sampling(self, temperature: float = DEFAULT_TEMPERATURE) -> SamplingSettings:
        """How to choose tokens, with a temperature for those who ask for none; without a seed the clock gives one."""
        return SamplingSettings(
            temperature=temperature if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=time.time_ns() if self.seed is None else self.seed,
        )


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability in nats."""

    text: str
    log_probability: float


@dataclass(frozen=True)
class GeneratedToken:
    """One more token. `text` is what may be shown of the text so far: less than the token's own while it might be
    part of
    a stop string, more when it turns out not to be."""

    text: str
    token: Scored
    alternatives: tuple[Scored, ...] = ()


@dataclass(frozen=True)
class GenerationSummary:
    """How a text ended and came about; `tail` is text that was held back; times in seconds."""

    tail: str
    finish: Finish
    tokens: int
    seed: int
    model: str
    version: str
    variant: str
    batch_size: int
    queue_seconds: float
    preprocess_seconds: float
    infer_seconds: float
    postprocess_seconds: float = 0.0


@dataclass(frozen=True)
class ScoreAnswer:
    """Each token with its log-probability given those before; the first has none. Times in seconds."""

    tokens: list[Scored]
    log_probability: float
    perplexity: float
    model: str
    version: str
    variant: str
    batch_size: int
    queue_seconds: float
    preprocess_seconds: float
    infer_seconds: float
    postprocess_seconds: float = 0.0


@dataclass(eq=False)
class Continuation(StepRun):
    """A text that grows by one token a step, until its window is full or it is long enough.

    Attributes:
        first: its first row.
        sampler: chooses the tokens.
        left: tokens that the window has room for.
        out: receives each token and the log-probabilities `[V]` that it was chosen from.
    """

    first: Start
    sampler: Sampler
    left: int
    out: asyncio.Queue[tuple[int, Floats]] = field(default_factory=asyncio.Queue)

    @property
    def rows(self) -> int:
        """See StepRun."""
        return 1

    @property
    def rows_at_most(self) -> int:
        """See StepRun."""
        return 1

    @property
    def start(self) -> Start:
        """See StepRun."""
        return self.first

    def advance(self, outputs: dict[str, Array], rows: slice) -> Next | None:
        """See StepRun."""
        if self.over:
            return None
        self.steps += 1
        log_probabilities = outputs["log_probabilities"][rows.start, -1]
        token = self.sampler.choose(log_probabilities)
        self.out.put_nowait((token, log_probabilities))
        self.left -= 1
        self.over = self.left == 0
        return None if self.over else Next([0], [token])


class TextGenerator:
    """Continues and scores text with any model of the repository whose task is text generation."""

    def __init__(self, engine: Engine, config: NlpConfig) -> None:
        self._engine = engine
        self._config = config
        self._loops = DecodingLoops()
        self._tokenizers: WeakKeyDictionary[Served, TextTokenizer] = WeakKeyDictionary()

    async def generate(self, query: GenerateQuery) -> AsyncGenerator[GeneratedToken | GenerationSummary, None]:
        """Continues a prompt: the tokens as they are chosen, and a summary at the end.

        Raises:
            InvalidInput: the prompt or a setting.
            ModelNotFound: model, version or variant.
            ModelUnavailable: the model is broken, unloaded or no language model.
            Overloaded: the model's queue is full.
            DeadlinePassed: before the text was complete.
        """
        self._check_text("prompt", query.prompt)
        check_generation(query)
        name = query.model or self._config.default_generator
        async with self._engine.models.acquire(name, query.version, query.variant) as served:
            with served.batcher.admit():
                writing = _Writing(self, query, name, served)
                async with aclosing(writing.run()) as items:
                    async for item in items:
                        yield item

    async def score(self, text: str, model: str, version: str, variant: str, deadline: float) -> ScoreAnswer:
        """How probable a text is, token by token; windows overlap by half, so that each token sees half a context.

        Raises:
            InvalidInput: the text.
            ModelNotFound, ModelUnavailable, Overloaded, DeadlinePassed: as `generate`.
        """
        self._check_text("text", text)
        name = model or self._config.default_generator
        async with self._engine.models.acquire(name, version, variant) as served:
            with served.batcher.admit():
                started = time.perf_counter()
                tokenizer, context = self.tokenizer(served), context_of(served)
                ids = tokenizer.encode(text)
                if len(ids) < 2:
                    raise InvalidInput("text", "has fewer than two tokens, expected more", reason="TEXT_TOO_SHORT")
                preprocess_seconds = time.perf_counter() - started
                served.observer.preprocess.observe(preprocess_seconds)
                values: list[float] = []
                queue_seconds = infer_seconds = 0.0
                batch_size = 1
                for begin, skip in windows(len(ids), context):
                    window = ids[begin : begin + context + 1]
                    result = await served.batcher.submit(prompt_feeds(served, window[:-1]), deadline)
                    rows = result.outputs["log_probabilities"][0]
                    values += [float(rows[at, window[at + 1]]) for at in range(skip, len(window) - 1)]
                    queue_seconds += result.queue_seconds
                    infer_seconds += result.infer_seconds
                    batch_size = result.batch_size
                total = math.fsum(values)
                return ScoreAnswer(
                    tokens=[Scored(*pair) for pair in zip(tokenizer.split(text), [0.0, *values], strict=True)],
                    log_probability=total,
                    perplexity=math.exp(-total / len(values)),
                    model=name,
                    version=served.version,
                    variant=served.variant,
                    batch_size=batch_size,
                    queue_seconds=queue_seconds,
                    preprocess_seconds=preprocess_seconds,
                    infer_seconds=infer_seconds,
                )

    def tokenizer(self, served: Served) -> TextTokenizer:
        """The vocabulary of a leased model.

        Raises:
            ModelUnavailable: it is no language model.
        """
        tokenizer = self._tokenizers.get(served)
        if tokenizer is None:
            manifest = served.manifest
            if manifest.task != GENERATION or VOCABULARY not in served.assets:
                raise ModelUnavailable(f"model {manifest.name} does {manifest.task}, not {GENERATION}")
            tokenizer = read_text_tokenizer(served.assets[VOCABULARY].decode())
            self._tokenizers[served] = tokenizer
        return tokenizer

    async def step(self, served: Served, run: Continuation) -> None:
        """Steps a text with those of the other callers."""
        await self._loops.of(served).run(run)

    def _check_text(self, name: str, text: str) -> None:
        most = self._config.max_text_characters
        if not text:
            raise InvalidInput(name, "is empty, expected text, if only one character", reason="TEXT_EMPTY")
        if len(text) > most:
            raise InvalidInput(name, f"has {len(text)} characters, expected at most {most}", reason="TEXT_TOO_LONG")


class _Writing:
    """One text from its prompt to its end."""

    def __init__(self, generator: TextGenerator, query: GenerateQuery, name: str, served: Served) -> None:
        self._generator, self._query, self._name, self._served = generator, query, name, served
        self._tokenizer, self._context = generator.tokenizer(served), context_of(served)
        self._habits = ModelHabits.of(served.manifest)
        self._habits.check(query.prompt, name)
        self._settings = query.sampling(self._habits.temperature)
        self._sampler = Sampler(self._settings)
        self._stops = StopStrings((*query.stop, self._habits.stop) if self._habits.stop else query.stop)
        self._kept = ""
        self._most = self._habits.length if query.max_tokens is None else query.max_tokens
        self._tokens = 0
        self._batch_size = 1
        self._queue_seconds = self._infer_seconds = self._preprocess_seconds = 0.0

    async def run(self) -> AsyncGenerator[GeneratedToken | GenerationSummary, None]:
        """The tokens, and the summary."""
        started = time.perf_counter()
        ids = self._tokenizer.encode(self._query.prompt)
        self._preprocess_seconds = time.perf_counter() - started
        self._served.observer.preprocess.observe(self._preprocess_seconds)
        stopped = False
        while self._tokens < self._most and not stopped:
            window = ids[-self._context :] if len(ids) < self._context else ids[-(self._context // 2) :]
            async with aclosing(self._window(window)) as pairs:
                async for token, log_probabilities in pairs:
                    ids.append(token)
                    self._tokens += 1
                    shown, stopped = self._stops.feed(self._tokenizer.pieces[token])
                    yield self._item(self._showable(shown), token, log_probabilities)
                    if stopped:
                        break
        yield self._summary("stop" if stopped else "length")

    async def _window(self, window: list[int]) -> AsyncGenerator[tuple[int, Floats], None]:
        """Reads a window in one run, and then writes until it is full; yields tokens as they are chosen."""
        result = await self._served.batcher.submit(prompt_feeds(self._served, window), self._query.deadline)
        self._queue_seconds += result.queue_seconds
        self._infer_seconds += result.infer_seconds
        self._batch_size = result.batch_size
        log_probabilities = result.outputs["log_probabilities"][0, -1]
        token = self._sampler.choose(log_probabilities)
        left = min(self._context - len(window), self._most - self._tokens - 1)
        yield token, log_probabilities
        if left <= 0:
            return
        caches = {name.removeprefix(NEW): array for name, array in result.outputs.items() if name.startswith(NEW)}
        run = Continuation(Start(token, len(window), caches), self._sampler, left, deadline=self._query.deadline)
        async with aclosing(self._follow(run)) as pairs:
            async for pair in pairs:
                yield pair

    async def _follow(self, run: Continuation) -> AsyncGenerator[tuple[int, Floats], None]:
        """The tokens of a run as they come; the run ends when nobody reads on."""
        stepping = asyncio.create_task(self._generator.step(self._served, run))
        reading: asyncio.Task[tuple[int, Floats]] | None = None
        try:
            while not (stepping.done() and run.out.empty()):
                reading = asyncio.create_task(run.out.get())
                await asyncio.wait({reading, stepping}, return_when=asyncio.FIRST_COMPLETED)
                if reading.done():
                    yield reading.result()
                else:
                    reading.cancel()
            await stepping
        finally:
            run.over = True
            for task in (stepping, reading):
                if task is not None:
                    task.cancel()
            await asyncio.gather(stepping, return_exceptions=True)
            self._queue_seconds += run.queue_seconds
            self._infer_seconds += run.infer_seconds
            self._batch_size = max(self._batch_size, run.batch_size)

    def _item(self, shown: str, token: int, log_probabilities: Floats) -> GeneratedToken:
        pieces = self._tokenizer.pieces
        best: list[int] = []
        if self._query.alternatives:
            best = (FIRST_PIECE + np.argsort(-log_probabilities[FIRST_PIECE:])[: self._query.alternatives]).tolist()
        return GeneratedToken(
            shown,
            Scored(pieces[token], float(log_probabilities[token])),
            tuple(Scored(pieces[index], float(log_probabilities[index])) for index in best),
        )

    def _showable(self, text: str) -> str:
        """What may be shown of new text now: nothing if its end comes first."""
        if not self._habits.reversed:
            return text
        self._kept += text
        return ""

    def _summary(self, finish: Finish) -> GenerationSummary:
        tail = self._showable("" if finish == "stop" else self._stops.flush())
        return GenerationSummary(
            tail=tail + self._kept[::-1],
            finish=finish,
            tokens=self._tokens,
            seed=self._settings.seed,
            model=self._name,
            version=self._served.version,
            variant=self._served.variant,
            batch_size=self._batch_size,
            queue_seconds=self._queue_seconds,
            preprocess_seconds=self._preprocess_seconds,
            infer_seconds=self._infer_seconds,
        )


def context_of(served: Served) -> int:
    """Positions that a model sees."""
    return int(served.manifest.preprocessing["context"])


def prompt_feeds(served: Served, ids: list[int]) -> dict[str, Array]:
    """The inputs that read `ids` from the beginning, with a cache that holds nothing."""
    feeds: dict[str, Array] = {}
    for spec in served.manifest.inputs:
        if len(spec.shape) == 4:
            feeds[spec.name] = np.zeros((1, spec.shape[1], 1, spec.shape[3]), np.float32)
    return feeds | {"tokens": np.array([ids], np.int64), "position": np.zeros(1, np.int64)}


def windows(length: int, context: int) -> list[tuple[int, int]]:
    """Where windows over `length` tokens begin, and how many of each one's predictions the one before made already."""
    found, begin = [(0, 0)], 0
    while begin + context + 1 < length:
        step = min(context // 2, length - context - 1 - begin)
        begin += step
        found.append((begin, context - step))
    return found


def check_generation(query: GenerateQuery) -> None:
    """Raises InvalidInput if a setting is out of its range."""
    _check("max_tokens", query.max_tokens, 1, MAX_TOKENS)
    _check("temperature", query.temperature, 0, MAX_TEMPERATURE)
    _check("top_k", query.top_k, 0, MAX_TOP_K)
    _check("alternatives", query.alternatives, 0, MAX_ALTERNATIVES)
    if query.top_p is not None and not 0 < query.top_p <= 1:
        raise InvalidInput("top_p", f"is {query.top_p:g}, expected above 0 and at most 1")
    if len(query.stop) > MAX_STOPS:
        raise InvalidInput("stop", f"holds {len(query.stop)} strings, expected at most {MAX_STOPS}")
    for index, stop in enumerate(query.stop):
        if not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            raise InvalidInput(f"stop[{index}]", f"has {len(stop)} characters, expected 1 to {MAX_STOP_CHARACTERS}")


def _check(name: str, value: float | None, least: float, most: float) -> None:
    if value is not None and not least <= value <= most:  # also not a number
        raise InvalidInput(name, f"is {value:g}, expected {least:g} to {most:g}")
