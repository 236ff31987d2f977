"""Draws what language models learnt: `python -m services.nlp.training.draw_gpt --runs runs --out docs/pictures`.

The loss on held-back text against guessing, for each text; accuracy by the number of examples in the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from services.nlp.training.plots import draw_lines
from services.nlp.training.publishing import read_result
from services.nlp.training.tasks import Permutations
from services.nlp.training.texts import TEXTS
from services.nlp.training.train_gpt import STEPS_PER_EPOCH
from services.nlp.training.train_task import NAMES
from shared.training.loop import read_log


@dataclass(frozen=True)
class DrawGptConfig:
    """Draws the pictures of the runs that are there."""

    runs: Path = Path("runs")
    """Folder of all runs."""
    out: Path = Path("docs/pictures")
    """Where the pictures go."""


def draw_losses(folder: Path, text: str, path: Path) -> None:
    """A run's loss on held-back text by step, against the baselines as lines."""
    result, log = read_result(folder), read_log(folder)
    points = {STEPS_PER_EPOCH * (line["epoch"] + 1): line["val_loss"] for line in log}
    draw_lines(
        path,
        {f"GPT, {result['network']['layers']} layers of {result['network']['width']}": points},
        {f"{name} {value:.2f}": value for name, value in result["baselines"].items()},
        title=f"{TEXTS[text].title}: held-back text",
        across="steps",
        label="nats a character",
    )


def draw_shots(folder: Path, path: Path) -> None:
    """Accuracy by the number of examples, against one who forgets nothing, one who only repeats, and chance."""
    measures, task = read_result(folder)["measures"], Permutations()
    size = len(task.letters)
    found = {float(shots): measures[f"accuracy_{shots}_shots"] for shots in task.shots}
    best = {float(shots): task.best_possible(shots) for shots in range(max(task.shots) + 1)}
    repeating = {shots: 1 - (1 - 1 / size) ** (shots + 1) for shots in best}
    draw_lines(
        path,
        {"GPT": found, "all that the examples tell": best, "what was seen, else a guess": repeating},
        {f"chance {1 / size:.3f}": 1 / size},
        title="Functions that were in no training, told by examples in the prompt",
        across="examples (shots)",
        label="accuracy",
    )


def main(config: DrawGptConfig) -> None:
    """Draws all and says what."""
    for text in TEXTS:
        folder = config.runs / f"{text}-gpt" / "seed0"
        if (folder / "result.json").exists():
            draw_losses(folder, text, config.out / f"nlp_loss_{text}.svg")
            print(f"drew {config.out / f'nlp_loss_{text}.svg'}")
    folder = config.runs / NAMES["permutations"] / "seed0"
    if (folder / "result.json").exists():
        draw_shots(folder, config.out / "nlp_shots.svg")
        print(f"drew {config.out / 'nlp_shots.svg'}")


if __name__ == "__main__":
    main(tyro.cli(DrawGptConfig, description=__doc__))
