"""Prunes a trained classifier and trains what is left: `python -m services.vision.training.prune --seed 0`.

Whole channels go (`shared/training/prune.py`), BatchNorm's statistics are measured anew and then held, and every weight
is trained again with the unpruned network as teacher, which keeps the answers close to those that they replace. The
epoch is chosen on the validation part; the test part is read once, at the end.

A run lives in `<runs>/<data>-<model>/pruned-seed<seed>/` and continues there if it was killed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from services.vision.preprocess import ClassificationPreprocessing
from services.vision.training.data import AugmentedBatches, Photos
from services.vision.training.models import MODELS
from services.vision.training.tasks import TASKS, Task
from services.vision.training.train import Parts, RunResult, finish_run, freeze_batch_norm, load_parts, validator
from shared.errors import ConfigurationError
from shared.training.checkpoint import save_weights
from shared.training.distil import TaughtBatches, taught_loss
from shared.training.loop import Fit, FitConfig, FitResult
from shared.training.memory import keep_freed_memory
from shared.training.prune import PruneConfig, load_pruned, prune, recalibrate_batch_norm
from shared.training.seed import seed_everything

LOG = logging.getLogger("usagi.prune")

FIT = FitConfig(epochs=6, learning_rate=3e-4, ema_decay=0.99, checkpoint_every=36)


@dataclass(frozen=True)
class PruneRunConfig:
    """Takes channels out of a trained classifier and trains the rest."""

    base: str = "finetune-seed0"
    """Run to prune; also the teacher."""
    data: Literal["flowers", "fashion"] = "flowers"
    """What that run learned."""
    model: str = "efficientnet-lite0"
    """Network of that run."""
    seed: int = 0
    """Of order and augmentation."""
    pruning: PruneConfig = field(default_factory=PruneConfig)
    """How much goes, by which measure."""
    importance_batches: int = 20
    """Batches of the training part on which importance is measured."""
    statistics_photos: int = 512
    """Photos of the training part on which BatchNorm is measured anew."""
    epochs: int = FIT.epochs
    """Passes over the training part."""
    learning_rate: float = FIT.learning_rate
    """Peak of the schedule."""
    batch: int = 32
    """Photos in a step."""
    train_size: int = 160
    """Side of the training crops in the first epochs, in pixels."""
    final_epochs: int = 2
    """Last epochs, which train at the size of serving."""
    teacher_weight: float = 0.9
    """Share of the loss that follows the teacher; the rest follows the labels."""
    temperature: float = 4.0
    """Softens both answers in the teacher's share."""
    threads: int = 1
    """CPU threads."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    quick: bool = False
    """A few hundred photos and one epoch: shows in under three minutes that everything works."""

    mode = "pruned"

    @property
    def task(self) -> Task:
        """What `data` names."""
        return TASKS[self.data]

    @property
    def preprocessing(self) -> ClassificationPreprocessing:
        """What the network sees."""
        return self.task.preprocessing

    @property
    def folder(self) -> Path:
        """Where this run lives."""
        return self._folder(f"{self.mode}-seed{self.seed}")

    @property
    def base_folder(self) -> Path:
        """Where the run to prune lives."""
        return self._folder(self.base)

    def _folder(self, name: str) -> Path:
        return self.runs / f"{self.data}-{self.model}" / (name + ("-quick" if self.quick else ""))

    @property
    def fit(self) -> FitConfig:
        """The schedule."""
        return dataclasses.replace(FIT, epochs=1 if self.quick else self.epochs, learning_rate=self.learning_rate)

    def size_at(self, epoch: int) -> int:
        """Side of the training crops in an epoch."""
        full = self.preprocessing.size
        return min(self.train_size, full) if epoch < self.fit.epochs - self.final_epochs else full

    @property
    def command(self) -> str:
        """The command line that makes this run again, without paths of the machine."""
        words = ["python -m services.vision.training.prune", f"--seed {self.seed}"]
        default = PruneRunConfig()
        for name in (f.name for f in dataclasses.fields(self)):
            if name not in ("seed", "runs", "quick", "pruning"):
                words += _option(name, getattr(self, name), getattr(default, name))
        for name in (f.name for f in dataclasses.fields(self.pruning)):
            words += _option(f"pruning.{name}", getattr(self.pruning, name), getattr(default.pruning, name))
        return " ".join([*words, "--quick"] if self.quick else words)


def _option(name: str, value: object, default: object) -> list[str]:
    return [] if value == default else [f"--{name.replace('_', '-')} {value}"]


def train_pruned(config: PruneRunConfig) -> RunResult:
    """Prunes, trains, measures on the test part once, and writes `weights.pt`, `result.json` and `curves.png`.

    Raises:
        ConfigurationError: the run to prune is missing, or cannot be pruned so far.
    """
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    parts = load_parts(config.quick, config.task)
    seed_everything(config.seed)
    teacher = _load_base(config)
    student = _start(teacher, parts, config)
    student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return finish_run(student, _fit(student, teacher, parts, config), parts, config)


def _load_base(config: PruneRunConfig) -> nn.Module:
    path = config.base_folder / "weights.pt"
    if not path.exists():
        raise ConfigurationError(f"{path} does not exist; train first: python -m services.vision.training.train --help")
    model = MODELS.get(config.model)(len(config.task.labels), False)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.to(memory_format=torch.channels_last).eval()  # type: ignore[no-any-return, call-overload]


def _start(teacher: nn.Module, parts: Parts, config: PruneRunConfig) -> nn.Module:
    """The pruned network before training; kept in `start.pt`, so that a resumed run starts from the same channels."""
    path = config.folder / "start.pt"
    if path.exists():
        return load_pruned(
            MODELS.get(config.model)(len(config.task.labels), False), torch.load(path, weights_only=True)
        )
    source = _crops(parts.train, config, lambda _: config.preprocessing.size)
    batches = [source.batch(0, step) for step in range(min(config.importance_batches, source.steps_per_epoch))]
    example = torch.zeros(1, 3, config.preprocessing.size, config.preprocessing.size)
    pruned = prune(teacher, example, config.pruning, batches)
    LOG.info("%.0f of %.0f million multiply-adds are left", pruned.macs_after / 1e6, pruned.macs_before / 1e6)
    recalibrate_batch_norm(pruned.model, _plain_batches(parts.train.take(config.statistics_photos), config))
    save_weights(path, pruned.model)
    return pruned.model


def _plain_batches(photos: Photos, config: PruneRunConfig) -> Iterator[Tensor]:
    inputs = torch.from_numpy(np.stack(list(photos.tensors(config.preprocessing))))
    yield from torch.split(inputs, 64)


def _crops(photos: Photos, config: PruneRunConfig, size_at: Callable[[int], int]) -> AugmentedBatches:
    return AugmentedBatches(
        photos,
        config.preprocessing,
        size_at=size_at,
        batch=config.batch,
        seed=config.seed,
        augmentation=config.task.augmentation,
    )


def _fit(student: nn.Module, teacher: nn.Module, parts: Parts, config: PruneRunConfig) -> FitResult:
    run = Fit(
        student,
        TaughtBatches(_crops(parts.train, config, config.size_at), teacher),
        taught_loss(config.teacher_weight, config.temperature),
        validator(parts.val, config.preprocessing),
        config.fit,
        config.folder,
        prepare=freeze_batch_norm,
        fingerprint=config.command,
    )
    return run.run()


def main(config: PruneRunConfig) -> None:
    """Prunes, trains and says what came out."""
    result = train_pruned(config)
    test, val = f"{result.accuracy:.4f} (n={result.test_photos})", f"{result.accuracy_val:.4f} (n={result.val_photos})"
    print(f"{config.folder}: test accuracy {test}, validation {val}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(PruneRunConfig, description=__doc__))
