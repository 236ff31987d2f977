"""Exports a GPT that learnt a task and publishes it: `python -m services.nlp.training.export_task --task addition`.

It ships if greedy search reaches the task's least measure on what is held back, and int8 if it is at most half a
point worse than `fp16`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnxruntime as ort
import tyro

from services.nlp.serving.generator import VOCABULARY
from services.nlp.training.export_gpt import GptRelease, load_model, publish_gpt
from services.nlp.training.offline import onnx_predictor
from services.nlp.training.publishing import read_result
from services.nlp.training.tasks import TASKS, Task
from services.nlp.training.train_task import NAMES
from shared.artifacts import TrainingRecord
from shared.errors import ConfigurationError
from shared.training.machine import cpu_name

MARGIN = 0.005


@dataclass(frozen=True)
class ExportTaskConfig:
    """Exports a small GPT that learnt a task, compresses it, and publishes it with its manifest."""

    task: Literal["addition", "permutations"] = "addition"
    """What the run learnt."""
    seed: int = 0
    """Seed of the run to ship."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    root: Path = Path("var/models")
    """Model root to publish into; `deploy/models` holds what the images are built with."""
    version: int = 1
    """Version number to publish as; the same version is replaced."""
    quick: bool = False
    """Export a `--quick` run, whatever it can; the card is not copied to `services/nlp/cards`."""

    @property
    def run_folder(self) -> Path:
        """Where the run to ship lives."""
        return self.runs / NAMES[self.task] / (f"seed{self.seed}" + ("-quick" if self.quick else ""))

    @property
    def command(self) -> str:
        """The command line that exports this run again, without paths of the machine."""
        words = ["python -m services.nlp.training.export_task", f"--task {self.task}", f"--seed {self.seed}"]
        words += [f"--version {self.version}"] if self.version != 1 else []
        return " ".join([*words, "--quick"] if self.quick else words)


def export(config: ExportTaskConfig) -> Path:
    """Exports, measures, judges and publishes a run; returns the folder of the published version.

    Raises:
        ConfigurationError: the run is not finished or has not learnt its task, or the export differs from PyTorch.
    """
    result = read_result(config.run_folder)
    task = TASKS[config.task]()
    if result["measures"][task.measure] < task.least and not config.quick:
        raise ConfigurationError(
            f"{config.run_folder} has {task.measure} {result['measures'][task.measure]:.4f}, expected at least "
            f"{task.least}; train longer"
        )
    model = load_model(config.run_folder, result)

    def measure_variant(session: ort.InferenceSession) -> dict[str, float]:
        return {**task.evaluate(onnx_predictor(session)), "held_back_rows": float(len(task.held_back().tokens))}

    release = GptRelease(
        name=NAMES[config.task],
        version=config.version,
        description=f"{task.description} GPT over characters, {model.config.layers} layers of {model.config.width}. "
        "Times are those of one step of one row.",
        preprocessing={"context": model.config.context, "task": config.task, **task.serving},
        measure=task.measure,
        measure_variant=measure_variant,
        margin=MARGIN,
        training=_record(config, task, result),
    )
    vocabulary = (config.run_folder / VOCABULARY).read_text(encoding="utf-8")
    return publish_gpt(release, model, vocabulary, config.root, bundled=not config.quick)


def _record(config: ExportTaskConfig, task: Task, result: Mapping[str, Any]) -> TrainingRecord:
    return TrainingRecord(
        command=f"{result['command']} && {config.command}",
        seed=config.seed,
        data=f"{task.title}, made by services/nlp/training/tasks.py; a fifth is held back",
        data_licence="none needed",
        device=cpu_name(),
        wall_seconds=result["wall_seconds"],
        baselines=result["baselines"],
    )


def main(config: ExportTaskConfig) -> None:
    """Publishes and says where."""
    print(f"published {export(config)}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(ExportTaskConfig, description=__doc__))
