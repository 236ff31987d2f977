"""The nlp domain's part of the `usagi` command."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from google.protobuf import json_format
from google.protobuf.message import Message
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from usagi.nlp.v1 import nlp_service_pb2 as pb

from services.nlp.cli_reading import add_reading_commands
from services.nlp.picture import draw_attention, draw_probabilities, ground
from shared.artifacts import write_atomically
from shared.client.cli import add_connection_options, connect
from shared.client.nlp import GenerateOptions, NlpClient, TranslateOptions
from shared.errors import InvalidInput


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `usagi nlp`."""
    parser = commands.add_parser("nlp", help="translate, continue, score and read text")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    translate = verbs.add_parser(
        "translate",
        help="translate English sentences into Japanese",
        description="Translates English sentences into Japanese, one call a sentence; without a sentence it reads "
        "lines from standard input.",
    )
    translate.add_argument("sentences", nargs="*", metavar="SENTENCE", help="in English, each in quotes")
    translate.add_argument("--model", default="", help="model name (default: the service's default translator)")
    translate.add_argument("--version", default="", help="model version (default: the newest)")
    translate.add_argument("--variant", default="", help="fp16, int8 ... (default: auto, the fastest within budget)")
    translate.add_argument(
        "--beam", type=int, help="hypotheses that the search keeps, 1 for greedy search (default: 4)"
    )
    translate.add_argument("--n-best", type=int, help="how many translations to print, best first (default: 1)")
    translate.add_argument("--max-tokens", type=int, help="longest translation in pieces")
    translate.add_argument(
        "--length-penalty", type=float, help="0 to 2; larger favours longer ones (default: the model's own)"
    )
    translate.add_argument("--attention", type=Path, metavar="SVG", help="draw where the first translation looked")
    add_connection_options(translate)
    translate.set_defaults(command=_translate)
    _add_generate(verbs)
    _add_score(verbs)
    add_reading_commands(verbs)


def _add_generate(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = verbs.add_parser(
        "generate",
        help="continue a text",
        description="Continues a prompt with a language model and prints the text as it is written.",
    )
    generate.add_argument("prompt", metavar="PROMPT", help="what the text begins with, in quotes")
    _add_model(generate)
    generate.add_argument("--version", default="", help="model version (default: the newest)")
    generate.add_argument("--variant", default="", help="fp16, int8 ... (default: auto, the fastest within budget)")
    generate.add_argument("--max-tokens", type=int, help="tokens to write at most (default: 200)")
    generate.add_argument("--temperature", type=float, help="0 for the most probable text (default: 0.8)")
    generate.add_argument("--top-k", type=int, help="draw among so many of the most probable tokens (default: all)")
    generate.add_argument("--top-p", type=float, help="draw among tokens of this probability together (default: 1)")
    generate.add_argument("--seed", type=int, help="the same seed gives the same text (default: another each time)")
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this; repeatable")
    add_connection_options(generate)
    generate.set_defaults(command=_generate)


def _add_score(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    score = verbs.add_parser(
        "score",
        help="say how probable a text is",
        description="Prints a text with its improbable tokens in colour, and its perplexity.",
    )
    score.add_argument("text", metavar="TEXT", help="in quotes")
    _add_model(score)
    score.add_argument("--picture", type=Path, metavar="SVG", help="draw the text in the same colours")
    add_connection_options(score)
    score.set_defaults(command=_score)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="",
        type=_language_model,
        help="model name; one without a hyphen is short for NAME-gpt: soseki, shakespeare, adder (default: the "
        "service's default language model)",
    )


def _language_model(name: str) -> str:
    return f"{name}-gpt" if name and "-" not in name else name


def _translate(options: argparse.Namespace) -> int:
    sentences = options.sentences or [line.strip() for line in sys.stdin if line.strip()]
    if not sentences:
        raise InvalidInput("SENTENCE", "is missing, expected at least one sentence in quotes or on standard input")
    wishes = TranslateOptions(
        model=options.model,
        version=options.version,
        variant=options.variant,
        beam=options.beam,
        n_best=options.n_best,
        max_tokens=options.max_tokens,
        length_penalty=options.length_penalty,
        attention=options.attention is not None,
    )
    table = _table()
    with connect(options) as connection:
        client = NlpClient(connection)
        for number, sentence in enumerate(sentences):
            answer = client.translate(sentence, wishes)
            if options.json:
                print(_json(answer))
            else:
                _add_rows(table, sentence, answer)
            if options.attention and number == 0:
                write_atomically(options.attention, draw_attention(answer.hypotheses[0]))
    if not options.json:
        console = Console()
        console.print(table)
        info = answer.info
        console.print(f"answered by {info.model} version {info.version}; ms is the server's own time", style="dim")
    return 0


def _generate(options: argparse.Namespace) -> int:
    wishes = GenerateOptions(
        model=options.model,
        version=options.version,
        variant=options.variant,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stop=tuple(options.stop),
    )
    if not options.json:
        print(options.prompt, end="", flush=True)
    with connect(options) as connection:
        for answer in NlpClient(connection).generate(options.prompt, wishes):
            if options.json:
                print(_json(answer))
            else:
                print(answer.text, end="", flush=True)
    if not options.json:
        info = answer.info
        rate = answer.tokens / info.infer_seconds if info.infer_seconds else 0.0
        print()
        Console(stderr=True).print(
            f"{answer.tokens} tokens by {info.model} version {info.version}, {info.variant}; seed {answer.seed}; "
            f"{rate:.0f} tokens/s in ONNX Runtime",
            style="dim",
        )
    return 0


def _score(options: argparse.Namespace) -> int:
    with connect(options) as connection:
        answer = NlpClient(connection).score(options.text, model=options.model)
    if options.picture:
        write_atomically(options.picture, draw_probabilities(answer))
    if options.json:
        print(_json(answer))
        return 0
    text = Text()
    for token in answer.tokens:
        text.append(token.text, style="black on rgb({},{},{})".format(*ground(token.log_probability)))
    console = Console()
    console.print(text)
    console.print(
        f"{-answer.log_probability / (len(answer.tokens) - 1):.3f} nats a token, perplexity {answer.perplexity:.2f}; "
        f"green is likely, red is not; {answer.info.model} version {answer.info.version}",
        style="dim",
    )
    return 0


def _json(answer: Message) -> str:
    return json.dumps(json_format.MessageToDict(answer, preserving_proto_field_name=True), ensure_ascii=False)


def _table() -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("English", "Japanese", "unknown", "variant"):
        table.add_column(heading, overflow="fold")
    for heading in ("score", "steps", "ms"):
        table.add_column(heading, justify="right")
    return table


def _add_rows(table: Table, sentence: str, answer: pb.TranslateResponse) -> None:
    info = answer.info
    seconds = info.queue_seconds + info.preprocess_seconds + info.infer_seconds + info.postprocess_seconds
    for rank, hypothesis in enumerate(answer.hypotheses):
        first = rank == 0
        table.add_row(
            sentence if first else "",
            f"[bold]{hypothesis.text}[/bold]" if first else hypothesis.text,
            " ".join(answer.unknown_words) if first else "",
            info.variant if first else "",
            f"{hypothesis.score:.2f}",
            str(answer.steps) if first else "",
            f"{seconds * 1000:.1f}" if first else "",
        )
