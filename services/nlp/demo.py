"""The nlp domain's part of `make demo`: real sentences, real translations, one picture of where one looked,
and texts that go on."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from usagi.nlp.v1 import nlp_service_pb2 as pb

from services.nlp.picture import draw_attention, draw_gaps
from shared.artifacts import write_atomically
from shared.client.connection import Connection
from shared.client.nlp import GenerateOptions, NlpClient, TranslateOptions, cosine

SENTENCES = (
    "Show your own business.",
    "I can't tell who will arrive first.",
    "Please bear this fact in mind.",
    "She was reading a book when I came home.",
    "How long does it take to get to Tokyo?",
)
TRANSLATORS = ("enja-transformer", "enja-gru")
REPEATS = 10
GAPS = ("I have [MASK] a book.", "She [MASK] to school by bus every morning.", "My [MASK] is a doctor.")
KINDS = ("where do you live", "open the window , please", "the train was late")
ALIKE = ("he likes music .", "she is fond of music .", "the train was late .")
FIRST = "Before we proceed any further, hear me speak."
SECONDS = ("You are all resolved rather to die than to famish?", "The moon shines bright upon the silver sea.")
PROMPTS = {"shakespeare-gpt": "ROMEO:\n", "soseki-gpt": "私は"}
"""What each language model goes on from."""
QUESTIONS = {"adder-gpt": ("12+34=", "58+67=", "99+1="), "fewshot-gpt": ("a4a", "a4b1c2b", "a4b1c2d3e6f")}
"""Prompts of the models that answer, not continue."""


def run(target: str, out: Path, console: Console) -> None:
    """Translates sentences through the gateway, prints them with timings, draws `nlp_attention.svg`, lets texts go on.

    Args:
        target: the gateway.
        out: folder for the picture.
        console: where to print.

    Raises:
        CallFailed: the service refused.
    """
    with Connection(target) as connection:
        client = NlpClient(connection)
        answers = [client.translate(sentence, TranslateOptions(attention=True)) for sentence in SENTENCES]
        _print_answers(answers, console)
        _print_translators(client, console)
        _print_timings(client, console)
        gaps = _print_reading(client, console)
        for model in PROMPTS:
            _print_text(client, model, console)
        _print_answered(client, console)
    write_atomically(out / "nlp_attention.svg", draw_attention(answers[1].hypotheses[0]))
    write_atomically(out / "nlp_gaps.svg", draw_gaps(gaps))


def _print_answers(answers: list[pb.TranslateResponse], console: Console) -> None:
    table = Table(title="Translate: English to Japanese", box=box.SIMPLE_HEAD)
    for heading in ("sentence", "translation", "score"):
        table.add_column(heading, overflow="fold")
    for sentence, answer in zip(SENTENCES, answers, strict=True):
        best = answer.hypotheses[0]
        table.add_row(sentence, best.text, f"{best.score:.2f}")
    info = answers[0].info
    table.caption = f"answered by {info.model} version {info.version}, variant {info.variant}"
    console.print(table)


def _print_translators(client: NlpClient, console: Console) -> None:
    """The same sentence by each translator: what attention is good for."""
    table = Table(title=f"Translate: {SENTENCES[3]}", box=box.SIMPLE_HEAD)
    for heading in ("model", "translation", "score", "ms"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "ms" else "left")
    for model in TRANSLATORS:
        options = TranslateOptions(model=model)
        client.translate(SENTENCES[3], options)  # the first call loads it
        seconds, _, _ = _timed(client, SENTENCES[3], options)
        best = client.translate(SENTENCES[3], options).hypotheses[0]
        table.add_row(model, best.text, f"{best.score:.2f}", f"{seconds * 1e3:.1f}")
    console.print(table)


def _print_timings(client: NlpClient, console: Console) -> None:
    title = f"Translate: one call at a time through the gateway, median of {REPEATS} rounds over all sentences, ms"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for heading in ("variant", "search", "whole call", "ONNX Runtime", "steps"):
        table.add_column(heading, justify="right")
    for beam in (1, 4):
        options = TranslateOptions(beam=beam)
        variant = client.translate(SENTENCES[0], options).info.variant  # the first call loads it
        rows = [_timed(client, sentence, options) for _ in range(REPEATS) for sentence in SENTENCES]
        medians = [statistics.median(column) for column in zip(*rows, strict=True)]
        search = "greedy" if beam == 1 else f"beam {beam}"
        table.add_row(variant, search, f"{medians[0] * 1e3:.1f}", f"{medians[1] * 1e3:.1f}", f"{medians[2]:.0f}")
    console.print(table)


def _print_text(client: NlpClient, model: str, console: Console) -> None:
    started = time.perf_counter()
    text, first = PROMPTS[model], 0.0
    for answer in client.generate(text, GenerateOptions(model=model, seed=1, max_tokens=240, temperature=0.7)):
        first = first or time.perf_counter() - started
        text += answer.text
    seconds, info = time.perf_counter() - started, answer.info
    console.print(Panel(text, title="GenerateText", box=box.SQUARE, width=76))
    console.print(
        f"{answer.tokens} characters by {info.model} version {info.version}, variant {info.variant}: the first after "
        f"{first * 1e3:.0f} ms, then {(answer.tokens - 1) / (seconds - first):.0f} a second"
    )


def _print_reading(client: NlpClient, console: Console) -> pb.FillMaskResponse:
    """What BERT says of texts that it reads as a whole; returns the gaps of the first."""
    table = Table(title="FillMask and ClassifyText: a gap filled, the kind of a sentence", box=box.SIMPLE_HEAD)
    for heading in ("text", "answer"):
        table.add_column(heading, overflow="fold")
    answers = [client.fill_mask(text) for text in GAPS]
    for text, answer in zip(GAPS, answers, strict=True):
        found = ", ".join(f"{one.piece} {one.probability:.2f}" for one in answer.gaps[0].candidates)
        table.add_row(escape(text), found)
    for text in KINDS:
        best = client.classify(text, top_k=1).classes[0]
        table.add_row(text, f"{best.label} {best.probability:.2f}")
    info = answers[0].info
    table.caption = f"answered by {info.model} version {info.version}, variant {info.variant}"
    console.print(table)
    vectors = [client.embed(text) for text in ALIKE]
    pairs = ", ".join(
        f"with {text!r} {cosine(vectors[0], v):.2f}" for text, v in zip(ALIKE[1:], vectors[1:], strict=True)
    )
    follows = [client.next_sentence(FIRST, second).probability for second in SECONDS]
    pairs += f"\nNextSentence, after {FIRST!r}: " + ", ".join(
        f"{second!r} {found:.2f}" for second, found in zip(SECONDS, follows, strict=True)
    )
    console.print(f"EmbedText, cosine of {ALIKE[0]!r}: {pairs}", markup=False)
    return answers[0]


def _print_answered(client: NlpClient, console: Console) -> None:
    table = Table(title="GenerateText: models that answer", box=box.SIMPLE_HEAD)
    for heading in ("model", "prompt", "answer"):
        table.add_column(heading)
    for model, prompts in QUESTIONS.items():
        for prompt in prompts:
            answers = client.generate(prompt, GenerateOptions(model=model))
            table.add_row(model, prompt, "".join(answer.text for answer in answers))
    console.print(table)


def _timed(client: NlpClient, sentence: str, options: TranslateOptions) -> tuple[float, float, float]:
    started = time.perf_counter()
    answer = client.translate(sentence, options)
    return time.perf_counter() - started, answer.info.infer_seconds, float(answer.steps)
