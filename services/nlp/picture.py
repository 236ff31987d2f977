"""Where a translation looked, how probable a text is, what may stand in a gap, as SVG: whoever shows it has fonts for
Japanese, which this machine need not have."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from html import escape

from usagi.nlp.v1 import nlp_service_pb2 as pb

CELL, LEFT, TOP, MARGIN = 34, 130, 110, 16
WIDTH, BAR = 640, 22
FONT = "font-family='Noto Sans CJK JP, Hiragino Sans, Yu Gothic, sans-serif' font-size='14' fill='#282828'"


def draw_attention(hypothesis: pb.Hypothesis) -> str:
    """An SVG of a hypothesis with its attention: a column for each piece of the sentence, a row for each written."""
    matrix = hypothesis.attention
    width = LEFT + CELL * matrix.columns + MARGIN
    height = TOP + CELL * matrix.rows + MARGIN
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' viewBox='0 0 {width} {height}'>",
        f"<rect width='{width}' height='{height}' fill='white'/>",
    ]
    for column, token in enumerate(matrix.source_tokens):
        x, y = LEFT + CELL * column + CELL // 2 + 4, TOP - 10
        parts.append(f"<text {FONT} x='{x}' y='{y}' transform='rotate(-50 {x} {y})'>{_shown(token)}</text>")
    for row, token in enumerate(matrix.target_tokens):
        y = TOP + CELL * row
        parts.append(f"<text {FONT} x='{LEFT - 10}' y='{y + CELL // 2 + 5}' text-anchor='end'>{_shown(token)}</text>")
        for column in range(matrix.columns):
            weight = matrix.weights[row * matrix.columns + column]
            shade = round(255 * (1 - min(1.0, weight)))
            parts.append(
                f"<rect x='{LEFT + CELL * column}' y='{y}' width='{CELL - 2}' height='{CELL - 2}' "
                f"fill='rgb({shade},{(shade + 255) // 2},255)'><title>{weight:.2f}</title></rect>"
            )
    return "\n".join([*parts, "</svg>\n"])


def draw_gaps(answer: pb.FillMaskResponse) -> str:
    """An SVG of what may stand in each gap: a bar for each candidate, as long as it is probable."""
    rows = sum(len(gap.candidates) + 1 for gap in answer.gaps)
    height = MARGIN * 2 + BAR * (rows + 1)
    pieces = " ".join(piece for piece in answer.pieces if piece not in ("[CLS]", "[SEP]"))
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{height}' viewBox='0 0 {WIDTH} {height}'>",
        f"<rect width='{WIDTH}' height='{height}' fill='white'/>",
        f"<text {FONT} x='{MARGIN}' y='{MARGIN + 12}'>{escape(pieces)}</text>",
    ]
    y = MARGIN + BAR
    for gap in answer.gaps:
        for candidate in gap.candidates:
            y += BAR
            length = round((WIDTH - LEFT - 5 * MARGIN) * candidate.probability)
            parts += [
                f"<text {FONT} x='{LEFT - 10}' y='{y}' text-anchor='end'>{escape(candidate.piece)}</text>",
                f"<rect x='{LEFT}' y='{y - 14}' width='{max(1, length)}' height='{BAR - 4}' fill='rgb(70,130,200)'/>",
                f"<text {FONT} x='{LEFT + length + 8}' y='{y}'>{candidate.probability:.2f}</text>",
            ]
        y += BAR
    return "\n".join([*parts, "</svg>\n"])


COLUMNS, COLUMN, ROW, KEY = 76, 10, 26, 34
LEAST_PROBABLE = 4.0
"""Nats at which the colour is red: one in fifty-five."""


def draw_probabilities(answer: pb.ScoreTextResponse) -> str:
    """An SVG of a text, each token on a ground from green (certain) over yellow to red; its figures are in tooltips."""
    cells = list(_lay_out(answer))
    height = MARGIN + KEY + ROW * (1 + max((row for *_, row in cells), default=0)) + MARGIN
    width = 2 * MARGIN + COLUMNS * COLUMN
    nats = -answer.log_probability / max(1, len(answer.tokens) - 1)
    title = f"{answer.info.model}: {nats:.2f} nats a token, as hard as guessing among {answer.perplexity:.1f}"
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' viewBox='0 0 {width} {height}'>",
        f"<rect width='{width}' height='{height}' fill='white'/>",
        f"<text {FONT} x='{MARGIN}' y='{MARGIN + 14}'>{escape(title)}; green is likely, red is not</text>",
    ]
    for character, number, column, row in cells:
        token = answer.tokens[number]
        x, y, size = MARGIN + COLUMN * column, MARGIN + KEY + ROW * row, _columns(character) * COLUMN
        red, green, blue = ground(token.log_probability) if number else (235, 235, 235)  # the first has no probability
        parts.append(
            f"<rect x='{x}' y='{y}' width='{size}' height='{ROW - 4}' fill='rgb({red},{green},{blue})'>"
            f"<title>{escape(repr(token.text))} {token.log_probability:.2f}</title></rect>"
            f"<text {FONT} x='{x + size / 2}' y='{y + 16}' text-anchor='middle'>{_visible(character)}</text>"
        )
    return "\n".join([*parts, "</svg>\n"])


def ground(log_probability: float) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255: light green for a token that was certain, light red for an improbable one."""
    surprise = min(1.0, -log_probability / LEAST_PROBABLE)
    return 120 + round(135 * min(1.0, 2 * surprise)), 120 + round(110 * min(1.0, 2 - 2 * surprise)), 130


def _lay_out(answer: pb.ScoreTextResponse) -> Iterator[tuple[str, int, int, int]]:
    """Each character with its token's number, column and row; a line feed is shown where it stands and ends the row."""
    column = row = 0
    for number, token in enumerate(answer.tokens):
        for character in token.text:
            if column + _columns(character) > COLUMNS:
                column, row = 0, row + 1
            yield character, number, column, row
            column += _columns(character)
            if character == "\n":
                column, row = 0, row + 1


def _columns(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _visible(character: str) -> str:
    """The character; a sign for a line feed, nothing for what XML does not allow or nobody sees."""
    if character == "\n":
        return "↵"
    return escape(character) if character.isprintable() else ""


def _shown(token: str) -> str:
    return escape({"<eos>": "(end)"}.get(token, token.replace("▁", "")))
