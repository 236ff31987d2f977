"""Draws a run of BERT against guessing: `python -m services.nlp.training.draw_bert --out docs/pictures`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import tyro

from services.nlp.training.publishing import read_result
from services.nlp.training.train_bert import STEPS_PER_EPOCH
from shared.training.loop import read_log

matplotlib.use("Agg")
from matplotlib import pyplot as plt


@dataclass(frozen=True)
class DrawBertConfig:
    """Draws `nlp_masked.png`."""

    seed: int = 0
    """Of the run."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    out: Path = Path("out")
    """Folder of the picture."""


def draw(config: DrawBertConfig) -> Path:
    """Loss and accuracy of the gaps in held-back sentences by step, with what guessing gives; returns the path."""
    folder = config.runs / "english-bert" / f"seed{config.seed}"
    log, guessing = read_log(folder), read_result(folder)["baselines"]
    steps = [STEPS_PER_EPOCH * (line["epoch"] + 1) for line in log]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    axes[0].plot(steps, [line["loss"] for line in log], marker=".", label="BERT")
    axes[1].plot(steps, [line["accuracy"] for line in log], marker=".", label="BERT")
    axes[0].axhline(guessing["uniform"], color="grey", linestyle=":", label="uniform")
    axes[0].axhline(guessing["unigram"], color="grey", linestyle="--", label="by frequency")
    axes[1].axhline(guessing["most_frequent_accuracy"], color="grey", linestyle="--", label="most frequent piece")
    for axis, label in zip(axes, ("nats a gap", "share of gaps filled right"), strict=True):
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle("Masked pieces of held-back sentences")
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "nlp_masked.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main(config: DrawBertConfig) -> None:
    """Draws and says where."""
    print(f"drew {draw(config)}")


if __name__ == "__main__":
    main(tyro.cli(DrawBertConfig, description=__doc__))
