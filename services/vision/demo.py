"""The vision domain's part of `make demo`: real photos, real answers, one picture of them."""

from __future__ import annotations

import time
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table
from usagi.vision.v1 import vision_service_pb2 as pb

from shared.client.connection import Connection
from shared.client.vision import Selection, VisionClient
from shared.errors import ConfigurationError
from shared.images import decode_image

SAMPLES = Path("tests/data/flowers")
REPEATS = 30
Picture = npt.NDArray[np.uint8]
_INK, _RIGHT, _WRONG, _REST = (40, 40, 40), (84, 130, 53), (178, 60, 48), (190, 196, 204)


def run(target: str, out: Path, console: Console) -> None:
    """Classifies the sample photos through the gateway, prints answers and timings, draws `vision_classify.png`.

    Args:
        target: the gateway.
        out: folder for the picture.
        console: where to print.

    Raises:
        ConfigurationError: the samples are not there.
        CallFailed: the service refused.
    """
    photos = {path.stem: path.read_bytes() for path in sorted(SAMPLES.glob("*.jpg"))}
    if not photos:
        raise ConfigurationError(f"no sample photos in {SAMPLES}; run the demo from the repository's root")
    with Connection(target) as connection:
        client = VisionClient(connection)
        answers = {answer.id: answer.response for answer in client.classify_many(photos.items())}
        _print_answers(answers, console)
        _print_timings(client, next(iter(photos.values())), console)
    picture = draw_answers({name: (photos[name], answers[name]) for name in photos})
    cv2.imwrite(str(out / "vision_classify.png"), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))


def _print_answers(answers: dict[str, pb.ClassifyImageResponse], console: Console) -> None:
    table = Table(title="ClassifyImages: eight photos over one stream", box=box.SIMPLE_HEAD)
    for heading in ("photo", "answer", "probability", "truth"):
        table.add_column(heading, overflow="fold")
    for name in sorted(answers):
        first = answers[name].classifications[0]
        truth = name.split("_")[0]
        verdict = "[green]right[/green]" if first.label == truth else "[red]wrong[/red]"
        table.add_row(name, first.label, f"{first.probability:.1%}", verdict)
    info = next(iter(answers.values())).info
    table.caption = f"answered by {info.model} version {info.version}, variant {info.variant}"
    console.print(table)


def _print_timings(client: VisionClient, photo: bytes, console: Console) -> None:
    title = f"ClassifyImage: one call at a time through the gateway, median of {REPEATS}, ms"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for heading in ("variant", "whole call", "decode + preprocess", "ONNX Runtime"):
        table.add_column(heading, justify="right")
    for variant in ("fp32", "int8"):
        selection = Selection(variant=variant)
        client.classify(photo, selection)  # the first call loads the variant
        rows = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            info = client.classify(photo, selection).info
            rows.append((time.perf_counter() - started, info.preprocess_seconds, info.infer_seconds))
        table.add_row(variant, *(f"{value * 1000:.1f}" for value in np.median(rows, axis=0)))
    console.print(table)


def draw_answers(results: dict[str, tuple[bytes, pb.ClassifyImageResponse]], columns: int = 4) -> Picture:
    """A sheet of photos with bars of their class probabilities.

    Args:
        results: photo name, starting with its true class and `_` -> encoded photo and answer.
        columns: photos in a row.

    Returns:
        RGB `[H, W, 3]`.
    """
    cards = [_draw_card(name.split("_")[0], photo, answer) for name, (photo, answer) in results.items()]
    blank = np.full_like(cards[0], 255)
    cards += [blank] * (-len(cards) % columns)
    rows = [np.concatenate(cards[start : start + columns], axis=1) for start in range(0, len(cards), columns)]
    return np.concatenate(rows, axis=0)


def _draw_card(truth: str, photo: bytes, answer: pb.ClassifyImageResponse, size: int = 300, bar: int = 30) -> Picture:
    margin = 12
    classes = answer.classifications
    card = np.full((size + margin * 3 + bar * len(classes), size + 2 * margin, 3), 255, np.uint8)
    card[margin : margin + size, margin : margin + size] = _square(decode_image(photo), size)
    for row, entry in enumerate(classes):
        top = size + 2 * margin + row * bar
        right = entry.label == truth
        color = _RIGHT if right else (_WRONG if row == 0 else _REST)
        width = max(2, round(entry.probability * (size - 190)))
        cv2.rectangle(card, (margin + 110, top + 5), (margin + 110 + width, top + bar - 7), color, cv2.FILLED)
        for text, left in ((entry.label, margin), (f"{entry.probability:.1%}", margin + size - 66)):
            cv2.putText(card, text, (left, top + bar - 11), cv2.FONT_HERSHEY_SIMPLEX, 0.5, _INK, 1, cv2.LINE_AA)
    return card


def _square(image: Picture, size: int) -> Picture:
    """The centre of a picture as `[size, size, 3]`."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cropped = image[top : top + side, left : left + side]
    return np.asarray(cv2.resize(cropped, (size, size), interpolation=cv2.INTER_AREA), np.uint8)
