"""Trains a small GPT on a made-up task: `python -m services.nlp.training.train_task --task addition --seed 0`.

`addition` is minGPT's adder; `permutations` shows learning in context (Brown et al. 2020): the function is in no
weight, only in the examples before the question. The loss counts the answers alone. The epoch (250 steps) is chosen by
the loss on rows of the training part that are drawn anew; what is held back is measured once, at the end.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import nn

from services.nlp.training.losses import token_cross_entropy
from services.nlp.training.models.gpt import Gpt, GptConfig
from services.nlp.training.tasks import TASKS, Ints, Predict, Task, TaskBatches
from shared.artifacts import write_atomically
from shared.training.checkpoint import save_weights
from shared.training.command import command_line
from shared.training.curves import draw_curves
from shared.training.loop import Fit, FitConfig, Score
from shared.training.memory import keep_freed_memory
from shared.training.seed import sample_rng, seed_everything

STEPS_PER_EPOCH = 250
VALIDATION_ROWS = 1024
NAMES = {"addition": "adder-gpt", "permutations": "fewshot-gpt"}
"""Models by task."""


@dataclass(frozen=True)
class TrainTaskConfig:
    """Trains a small GPT on a made-up task and writes its run folder."""

    task: Literal["addition", "permutations"] = "addition"
    """What to learn."""
    seed: int = 0
    """Of initialisation and rows."""
    epochs: int = 24
    """Times 250 steps."""
    learning_rate: float = 3e-3
    """Peak of the schedule."""
    batch: int = 128
    """Rows in a step."""
    width: int = 64
    """Of the network."""
    layers: int = 2
    """Of the network."""
    heads: int = 4
    """Of each attention."""
    embedding_std: float = 0.02
    """Of embeddings at the start: larger ones tell places and letters apart, which finding examples needs."""
    waves: bool = False
    """Whether positions start as sines and cosines, in which the place before is easily found."""
    threads: int = 1
    """CPU threads."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    quick: bool = False
    """One epoch: shows in under a minute that everything works."""

    @property
    def name(self) -> str:
        """Of the model."""
        return NAMES[self.task]

    @property
    def folder(self) -> Path:
        """Where this run lives."""
        return self.runs / self.name / (f"seed{self.seed}" + ("-quick" if self.quick else ""))

    @property
    def fit(self) -> FitConfig:
        """The schedule."""
        return FitConfig(
            epochs=1 if self.quick else self.epochs,
            learning_rate=self.learning_rate,
            warmup_share=0.04,
            weight_decay=0.1,
            beta2=0.99,
            fused=True,
            ema_decay=0.99,
            checkpoint_every=0,
        )

    @property
    def command(self) -> str:
        """The command line that makes this run again, without paths of the machine."""
        return command_line("services.nlp.training.train_task", self, ("task", "seed"))


class TaskValidator:
    """Scores a model by its loss on rows of the training part, drawn once."""

    def __init__(self, task: Task, seed: int) -> None:
        rows = task.draw(sample_rng(seed, 10**6, 0), VALIDATION_ROWS)
        self.tokens, self.targets = torch.from_numpy(rows.tokens), torch.from_numpy(rows.targets)

    def __call__(self, model: nn.Module) -> Score:
        """Nats an answer's character."""
        with torch.inference_mode():
            loss = token_cross_entropy()(model(self.tokens), self.targets).item()
        return Score(-loss, {"val_loss": loss})


def predictor(model: nn.Module) -> Predict:
    """The most probable token after each, by a network."""

    def predict(tokens: Ints) -> Ints:
        with torch.inference_mode():
            logits = model(torch.from_numpy(np.ascontiguousarray(tokens)))
        found: Ints = logits.argmax(-1).numpy()
        return found

    return predict


def train(config: TrainTaskConfig) -> dict[str, object]:
    """Trains as configured; writes `weights.pt`, `vocabulary.json`, `result.json` and `curves.png`."""
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    task = TASKS[config.task]()
    tokenizer = task.tokenizer
    write_atomically(config.folder / "vocabulary.json", tokenizer.to_json())
    seed_everything(config.seed)
    sizes = GptConfig(
        len(tokenizer),
        task.context,
        config.width,
        config.layers,
        config.heads,
        embedding_std=config.embedding_std,
        waves=config.waves,
    )
    model = Gpt(sizes)
    fitted = Fit(
        model,
        TaskBatches(task, config.batch, config.seed, STEPS_PER_EPOCH),
        token_cross_entropy(),
        TaskValidator(task, config.seed),
        config.fit,
        config.folder,
        fingerprint=config.command,
    ).run()
    result = {
        "command": config.command,
        "seed": config.seed,
        "task": config.task,
        "measures": task.evaluate(predictor(model.eval())),
        "best_epoch": fitted.best_epoch,
        "wall_seconds": round(fitted.wall_seconds, 1),
        "baselines": task.baselines(),
        "network": dataclasses.asdict(sizes),
    }
    save_weights(config.folder / "weights.pt", model)
    write_atomically(config.folder / "result.json", json.dumps(result, indent=2) + "\n")
    draw_curves(config.folder, title=f"{task.title}, seed {config.seed}")
    return result


def main(config: TrainTaskConfig) -> None:
    """Trains and says what came out."""
    result = train(config)
    print(f"{config.folder}: {result['measures']} held back; without learning {result['baselines']}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(TrainTaskConfig, description=__doc__))
