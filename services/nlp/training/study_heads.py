"""Compares fine-tuning, a frozen network and training from nothing: `python -m services.nlp.training.study_heads`.

GPT-1's heads on the Shakespeare model, each with the same few labels, steps and learning rate; the classification with
three seeds. The epoch is chosen on labels that are set aside. Writes `table.md`, and a picture if it is told where to.
Finished runs are kept: the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from services.nlp.tokenizers.characters import CharacterTokenizer
from services.nlp.training.head_tasks import TASKS, Example, make_examples
from services.nlp.training.models.gpt import Gpt, GptConfig
from services.nlp.training.models.gpt_heads import GptWithHead, Objective, padded_examples
from services.nlp.training.plots import draw_bars
from services.nlp.training.publishing import read_result
from services.nlp.training.texts import held_back_text, training_text
from shared.artifacts import write_atomically
from shared.training.loop import Fit, FitConfig, Score
from shared.training.seed import epoch_order, seed_everything

Mode = Literal["fine-tuned", "frozen", "scratch"]
MODES: tuple[Mode, ...] = ("fine-tuned", "frozen", "scratch")
TEXT = "shakespeare"
DATA_SEED = 0
"""The labels are the same for every seed of training."""
LOG = logging.getLogger("usagi.train")


@dataclass(frozen=True)
class StudyHeadsConfig:
    """Trains every head in every way and compares."""

    tasks: tuple[Literal["question", "next", "same", "choice"], ...] = ("question", "next", "same", "choice")
    """Which of the tasks."""
    labels: int = 1000
    """Labelled examples that train."""
    chosen: int = 200
    """Further ones by which the epoch is chosen."""
    tested: int = 400
    """Examples of the held-back text."""
    epochs: int = 5
    """Passes over the labels."""
    batch: int = 32
    """Examples in a step."""
    learning_rate: float = 1e-3
    """Peak of the schedule, for all ways alike."""
    seeds: int = 3
    """Of the classification; the other heads are trained once."""
    threads: int = 1
    """CPU threads."""
    runs: Path = Path("runs")
    """Folder of all runs; the pretrained model's run is there too."""
    picture: Path | None = None
    """Where to write the picture."""
    quick: bool = False
    """Few labels and one epoch: shows that everything works."""

    @property
    def folder(self) -> Path:
        """Where the runs live."""
        return self.runs / ("gpt-heads-quick" if self.quick else "gpt-heads")

    @property
    def fit(self) -> FitConfig:
        """The schedule."""
        return FitConfig(
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            warmup_share=0.1,
            weight_decay=0.01,
            fused=True,
            ema_decay=0,
            checkpoint_every=0,
        )


@dataclass(frozen=True)
class HeadRun:
    """One training: a task, a way, a seed."""

    task: str
    mode: Mode
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.task}-{self.mode}-seed{self.seed}"


class ExampleBatches:
    """Examples in a new order each epoch."""

    def __init__(self, encoded: Sequence[list[list[int]]], labels: Tensor, size: int, seed: int) -> None:
        self.encoded, self.labels, self.size, self.seed = encoded, labels, size, seed
        self.steps_per_epoch = len(encoded) // size

    def batch(self, epoch: int, step: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """`(tokens, labels)`, which the objective takes, and the labels again, which the loop wants."""
        chosen = epoch_order(self.seed, epoch, len(self.encoded))[step * self.size : (step + 1) * self.size]
        labels = self.labels[torch.from_numpy(chosen)]
        return (padded_examples([self.encoded[index] for index in chosen]), labels), labels


@torch.inference_mode()
def accuracy(model: GptWithHead, encoded: Sequence[list[list[int]]], labels: Tensor, batch: int = 64) -> float:
    """Share of examples that are answered rightly."""
    parts = [model(padded_examples(encoded[at : at + batch])).argmax(-1) for at in range(0, len(encoded), batch)]
    return (torch.cat(parts) == labels).float().mean().item()


class HeadStudy:
    """All runs of a configuration."""

    def __init__(self, config: StudyHeadsConfig) -> None:
        self.config = config
        pretrained = config.runs / f"{TEXT}-gpt" / "seed0"
        self.sizes = GptConfig(**read_result(pretrained)["network"])
        self.tokenizer = CharacterTokenizer.from_json((pretrained / "vocabulary.json").read_text(encoding="utf-8"))
        self.weights = torch.load(pretrained / "weights.pt", weights_only=True)

    def runs(self) -> list[HeadRun]:
        """In the order in which they are made."""
        return [
            HeadRun(task, mode, seed)
            for task in self.config.tasks
            for seed in range(self.config.seeds if TASKS[task].head == "classification" else 1)
            for mode in MODES
        ]

    def build(self, run: HeadRun) -> GptWithHead:
        """The network at its start."""
        seed_everything(run.seed)
        gpt = Gpt(self.sizes)
        if run.mode != "scratch":
            gpt.load_state_dict(self.weights)
        return GptWithHead(gpt, TASKS[run.task].outputs, frozen=run.mode == "frozen")

    def examples(self, task: str) -> tuple[list[Example], list[Example], list[Example]]:
        """Those that train, that choose, and that test."""
        config = self.config
        made = make_examples(task, training_text(TEXT), config.labels + config.chosen, DATA_SEED)
        tested = make_examples(task, held_back_text(TEXT), config.tested, DATA_SEED)
        return made[: config.labels], made[config.labels :], tested

    def measure(self, run: HeadRun) -> dict[str, float]:
        """Trains one run, or reads what it gave."""
        folder = self.config.folder / run.name
        path = folder / "result.json"
        if path.exists():
            found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
            return found
        parts = [self._encoded(part) for part in self.examples(run.task)]
        model = self.build(run)

        def validate(objective: nn.Module) -> Score:
            share = accuracy(objective.model, *parts[1])  # type: ignore[arg-type]
            return Score(share, {"chosen_accuracy": share})

        fitted = Fit(
            Objective(model),
            ExampleBatches(*parts[0], self.config.batch, run.seed),
            lambda outputs, _: outputs,
            validate,
            self.config.fit,
            folder,
            fingerprint=f"{run.name} {self.config.labels} {self.config.chosen} {self.config.batch}",
        ).run()
        result = {
            "accuracy": accuracy(model.eval(), *parts[2]),
            "examples": float(len(parts[2][0])),
            "wall_seconds": round(fitted.wall_seconds, 1),
        }
        write_atomically(path, json.dumps(result, indent=2) + "\n")
        for name in ("last.pt", "best.pt"):
            (folder / name).unlink(missing_ok=True)
        return result

    def _encoded(self, examples: Sequence[Example]) -> tuple[list[list[list[int]]], Tensor]:
        labels = torch.tensor([example.label for example in examples])
        return [example.encode(self.tokenizer) for example in examples], labels


def render(results: dict[HeadRun, dict[str, float]]) -> str:
    """The table in Markdown: accuracy on the held-back text, with the least and the most where there are seeds."""
    lines = ["| task | head | chance | " + " | ".join(MODES) + " |", "|---|---|---:|" + "---:|" * len(MODES)]
    for task in dict.fromkeys(run.task for run in results):
        kind = TASKS[task]
        cells = [
            _cell([found["accuracy"] for run, found in results.items() if (run.task, run.mode) == (task, mode)])
            for mode in MODES
        ]
        lines.append(f"| {task} | {kind.head} | {kind.chance:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}" if values else ""


def draw(path: Path, results: dict[HeadRun, dict[str, float]]) -> None:
    """The table as bars."""
    groups: dict[str, dict[str, list[float]]] = {run.task: {mode: [] for mode in MODES} for run in results}
    for run, found in results.items():
        groups[run.task][run.mode].append(found["accuracy"])
    chances = {task: TASKS[task].chance for task in groups}
    draw_bars(path, groups, chances, title="GPT-1's heads on tiny Shakespeare", label="accuracy on the held-back text")


def main(config: StudyHeadsConfig) -> None:
    """Trains what is missing, prints the table, draws the picture."""
    torch.set_num_threads(config.threads)
    if config.quick:
        config = dataclasses.replace(config, labels=64, chosen=32, tested=32, epochs=1, seeds=1)
    study = HeadStudy(config)
    results = {}
    for run in study.runs():
        results[run] = study.measure(run)
        LOG.info("%s: %s", run.name, results[run])
        write_atomically(config.folder / "table.md", render(results))
    print(render(results))
    if config.picture:
        draw(config.picture, results)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(StudyHeadsConfig, description=__doc__))
