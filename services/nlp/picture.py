"""Where a translation looked, as an SVG: whoever shows it has fonts for Japanese, which this machine need not have."""

from __future__ import annotations

from html import escape

from usagi.nlp.v1 import nlp_service_pb2 as pb

CELL, LEFT, TOP, MARGIN = 34, 130, 110, 16
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


def _shown(token: str) -> str:
    return escape({"<eos>": "(end)"}.get(token, token.replace("▁", "")))
