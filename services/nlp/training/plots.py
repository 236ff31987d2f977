"""Pictures of studies as SVG, the same bytes for the same figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#2b6cb0", "#c05621", "#4a5568", "#2f855a")


def save(figure: Figure, path: Path) -> None:
    """Writes an SVG without the date, its names drawn from a fixed salt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"svg.hashsalt": "usagi", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_bars(
    path: Path,
    groups: Mapping[str, Mapping[str, Sequence[float]]],
    chances: Mapping[str, float],
    *,
    title: str,
    label: str,
) -> None:
    """Groups of bars, a bar's whisker from the least to the most of its values, and each group's chance as a line."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(groups))]
        values = [bars.get(name) or [0.0] for bars in groups.values()]
        means = [sum(one) / len(one) for one in values]
        whiskers = [
            [mean - min(one) for mean, one in zip(means, values, strict=True)],
            [max(one) - mean for mean, one in zip(means, values, strict=True)],
        ]
        axis.bar(places, means, width * 0.92, label=name, color=COLOURS[index % len(COLOURS)], yerr=whiskers, capsize=3)
    for place, group in enumerate(groups):
        axis.hlines(
            chances[group],
            place - 0.45,
            place + 0.45,
            color="black",
            linestyles="dotted",
            label="" if place else "chance",
        )
    axis.set_xticks(range(len(groups)), list(groups))
    _finish(axis, title, label)
    save(figure, path)


def draw_lines(
    path: Path,
    lines: Mapping[str, Mapping[float, float]],
    levels: Mapping[str, float],
    *,
    title: str,
    across: str,
    label: str,
) -> None:
    """Lines of values by place, and named levels as dotted lines."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for index, (name, points) in enumerate(lines.items()):
        axis.plot(list(points), list(points.values()), marker=".", label=name, color=COLOURS[index % len(COLOURS)])
    for name, value in levels.items():
        axis.axhline(value, color="black", linestyle="dotted", linewidth=1)
        axis.annotate(name, (0.99, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9)
    axis.set_xlabel(across)
    _finish(axis, title, label)
    save(figure, path)


def _finish(axis: Axes, title: str, label: str) -> None:
    axis.set_ylabel(label)
    axis.set_title(title)
    axis.grid(axis="y", alpha=0.3)
    axis.legend()
