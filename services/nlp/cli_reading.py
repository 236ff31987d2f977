"""`usagi nlp fill-mask`, `embed`, `classify` and `next-sentence`: what models say that read a text as a whole."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from google.protobuf import json_format
from google.protobuf.message import Message
from rich import box
from rich.console import Console
from rich.table import Table
from usagi.nlp.v1 import nlp_service_pb2 as pb

from services.nlp.picture import draw_gaps
from shared.artifacts import write_atomically
from shared.client.cli import add_connection_options, connect
from shared.client.nlp import NlpClient, cosine

Verbs = argparse._SubParsersAction  # generic only to type checkers


def add_reading_commands(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Adds the four verbs."""
    fill = _verb(verbs, "fill-mask", "say what may stand in the gaps of a text", "masked language model")
    fill.add_argument("text", metavar="TEXT", help="in quotes, with [MASK] in place of each gap")
    fill.add_argument("--top-k", type=int, help="candidates for each gap (default: 5)")
    fill.add_argument("--picture", type=Path, metavar="SVG", help="draw the candidates as bars")
    fill.set_defaults(command=_fill)
    embed = _verb(verbs, "embed", "compare texts by their vectors", "encoder")
    embed.add_argument("texts", nargs="+", metavar="TEXT", help="each in quotes")
    embed.set_defaults(command=_embed)
    classify = _verb(verbs, "classify", "say what kind of text a text is", "classifier")
    classify.add_argument("texts", nargs="+", metavar="TEXT", help="each in quotes")
    classify.add_argument("--top-k", type=int, help="classes to print (default: all)")
    classify.set_defaults(command=_classify)
    follows = _verb(verbs, "next-sentence", "say whether one text follows another", "masked language model")
    follows.add_argument("first", metavar="FIRST", help="in quotes")
    follows.add_argument("second", nargs="+", metavar="SECOND", help="what may follow, each in quotes")
    follows.set_defaults(command=_next)


def _verb(verbs: Verbs[argparse.ArgumentParser], name: str, purpose: str, kind: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
    parser.add_argument("--model", default="", help=f"model name (default: the service's default {kind})")
    parser.add_argument("--variant", default="", help="fp16, int8 ... (default: auto, the fastest within budget)")
    add_connection_options(parser)
    return parser


def _fill(options: argparse.Namespace) -> int:
    with connect(options) as connection:
        answer = NlpClient(connection).fill_mask(
            options.text, model=options.model, variant=options.variant, top_k=options.top_k
        )
    if options.picture:
        write_atomically(options.picture, draw_gaps(answer))
    if options.json:
        print(_json(answer))
        return 0
    table = Table("gap", "piece", "probability", box=box.SIMPLE_HEAD)
    for number, gap in enumerate(answer.gaps, 1):
        for rank, candidate in enumerate(gap.candidates):
            table.add_row("" if rank else str(number), candidate.piece, f"{candidate.probability:.3f}")
    console = Console()
    console.print(table)
    console.print(answer.text, markup=False)
    _say_who(console, answer)
    return 0


def _embed(options: argparse.Namespace) -> int:
    with connect(options) as connection:
        client = NlpClient(connection)
        answers = [client.embed(text, model=options.model, variant=options.variant) for text in options.texts]
    if options.json:
        for answer in answers:
            print(_json(answer))
        return 0
    table = Table("text", *map(str, range(1, len(answers) + 1)), box=box.SIMPLE_HEAD)
    for number, (text, answer) in enumerate(zip(options.texts, answers, strict=True), 1):
        table.add_row(f"{number}. {text}", *(f"{cosine(answer, other):.2f}" for other in answers))
    console = Console()
    console.print(table)
    console.print(f"cosines of vectors of {len(answers[0].embedding)}", style="dim")
    _say_who(console, answers[0])
    return 0


def _classify(options: argparse.Namespace) -> int:
    table = Table("text", "class", "probability", box=box.SIMPLE_HEAD)
    with connect(options) as connection:
        client = NlpClient(connection)
        for text in options.texts:
            answer = client.classify(text, model=options.model, variant=options.variant, top_k=options.top_k)
            if options.json:
                print(_json(answer))
            for rank, found in enumerate(answer.classes):
                table.add_row("" if rank else text, found.label, f"{found.probability:.3f}")
    if not options.json:
        console = Console()
        console.print(table)
        _say_who(console, answer)
    return 0


def _next(options: argparse.Namespace) -> int:
    table = Table("what may follow", "probability", box=box.SIMPLE_HEAD)
    with connect(options) as connection:
        client = NlpClient(connection)
        for second in options.second:
            answer = client.next_sentence(options.first, second, model=options.model, variant=options.variant)
            if options.json:
                print(_json(answer))
            table.add_row(second, f"{answer.probability:.3f}")
    if not options.json:
        console = Console()
        console.print(table)
        _say_who(console, answer)
    return 0


def _say_who(
    console: Console,
    answer: pb.FillMaskResponse | pb.EmbedTextResponse | pb.ClassifyTextResponse | pb.NextSentenceResponse,
) -> None:
    info = answer.info
    unknown = f"; unknown: {' '.join(answer.unknown_words)}" if answer.unknown_words else ""
    console.print(
        f"{info.model} version {info.version}, {info.variant}, {1e3 * info.infer_seconds:.1f} ms{unknown}",
        style="dim",
        markup=False,
    )


def _json(answer: Message) -> str:
    return json.dumps(json_format.MessageToDict(answer, preserving_proto_field_name=True), ensure_ascii=False)
