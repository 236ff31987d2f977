"""A run's curves as a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from shared.training.loop import read_log

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw_curves(folder: Path, *, title: str) -> Path:
    """Draws a run's `metrics.jsonl` as `curves.png`, losses left, all other measures right; returns the path."""
    log = read_log(folder)
    epochs = [line["epoch"] for line in log]
    names = [name for name in log[0] if name not in ("epoch", "wall_seconds")]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in names:
        axis = axes[0] if name.endswith("loss") else axes[1]
        axis.plot(epochs, [line[name] for line in log], marker=".", label=name.replace("_", " "))
    for axis, label in zip(axes, ("loss (nats)", "share"), strict=True):
        axis.set(xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend()
    figure.suptitle(title)
    path = folder / "curves.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
