"""The vision domain's part of the `usagi` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import json_format
from rich import box
from rich.console import Console
from rich.table import Table
from usagi.vision.v1 import vision_service_pb2 as pb

from shared.client.cli import add_connection_options, connect
from shared.client.vision import Selection, VisionClient
from shared.errors import InvalidInput


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `usagi vision`."""
    parser = commands.add_parser("vision", help="classify pictures")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    classify = verbs.add_parser(
        "classify",
        help="say what photos show",
        description="Classifies photos (JPEG, PNG, WebP, BMP) over one stream and prints the most probable classes.",
    )
    classify.add_argument("photos", nargs="+", type=Path, metavar="PHOTO", help="files to classify")
    classify.add_argument("--model", default="", help="model name (default: the service's default classifier)")
    classify.add_argument("--version", default="", help="model version (default: the newest)")
    classify.add_argument("--variant", default="", help="fp32, int8 ... (default: auto, the fastest within budget)")
    classify.add_argument("--top-k", type=int, default=None, help="how many classes to print (default: 5 at most)")
    add_connection_options(classify)
    classify.set_defaults(command=_classify)


def _classify(options: argparse.Namespace) -> int:
    selection = Selection(options.model, options.version, options.variant, options.top_k)
    photos = dict(_numbered(options.photos))
    with connect(options) as connection:
        answers = VisionClient(connection).classify_many(_read(photos), selection)
        by_id = {answer.id: answer for answer in answers}
    results = [(photos[key], by_id[key]) for key in photos]
    if options.json:
        for path, answer in results:
            body = json_format.MessageToDict(answer, preserving_proto_field_name=True)
            print(json.dumps({**body, "id": str(path)}))
    else:
        _print_table(results)
    failed = [(path, answer.error) for path, answer in results if answer.WhichOneof("result") == "error"]
    for path, error in failed:
        print(f"usagi: {path}: {error.message}", file=sys.stderr)
    return 1 if failed else 0


def _numbered(paths: list[Path]) -> Iterator[tuple[str, Path]]:
    for number, path in enumerate(paths):
        if not path.is_file():
            raise InvalidInput("PHOTO", f"{path} is not a file")
        yield str(number), path


def _read(photos: dict[str, Path]) -> Iterator[tuple[str, bytes]]:
    for key, path in photos.items():
        yield key, path.read_bytes()


def _print_table(results: list[tuple[Path, pb.ClassifyImagesResponse]]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("photo", "answer", "next", "variant"):
        table.add_column(heading, overflow="fold")
    table.add_column("ms", justify="right")
    for path, answer in results:
        response = answer.response
        if not response.classifications:
            table.add_row(path.name, "[red]error[/red]", "", "", "")
            continue
        first, *rest = response.classifications
        info = response.info
        seconds = info.queue_seconds + info.preprocess_seconds + info.infer_seconds + info.postprocess_seconds
        table.add_row(
            path.name,
            f"[bold]{first.label}[/bold] {first.probability:.1%}",
            ", ".join(f"{entry.label} {entry.probability:.1%}" for entry in rest[:1]),
            info.variant,
            f"{seconds * 1000:.1f}",
        )
    console = Console()
    console.print(table)
    models = {f"{info.model} version {info.version}" for _, answer in results if (info := answer.response.info).model}
    console.print(f"answered by {', '.join(sorted(models)) or 'nobody'}; ms is the server's own time", style="dim")
