"""The nlp domain's part of the `usagi` command."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from google.protobuf import json_format
from rich import box
from rich.console import Console
from rich.table import Table
from usagi.nlp.v1 import nlp_service_pb2 as pb

from services.nlp.picture import draw_attention
from shared.artifacts import write_atomically
from shared.client.cli import add_connection_options, connect
from shared.client.nlp import NlpClient, TranslateOptions
from shared.errors import InvalidInput


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `usagi nlp`."""
    parser = commands.add_parser("nlp", help="translate text")
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
    translate.add_argument("--length-penalty", type=float, help="0 to 2; larger favours longer ones (default: 0.6)")
    translate.add_argument("--attention", type=Path, metavar="SVG", help="draw where the first translation looked")
    add_connection_options(translate)
    translate.set_defaults(command=_translate)


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
                print(
                    json.dumps(json_format.MessageToDict(answer, preserving_proto_field_name=True), ensure_ascii=False)
                )
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
