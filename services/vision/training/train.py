"""Trains a classifier of pictures: `python -m services.vision.training.train --mode finetune --seed 0`.

Three modes, the rows of the comparison: `scratch` learns everything from random weights, `frozen` learns only a linear
classifier on ImageNet features, `finetune` starts from that classifier and then trains every weight with a small
learning rate (Kumar et al. 2022: a random classifier would first distort the features). BatchNorm keeps its ImageNet
statistics when fine-tuning.

A run lives in `<runs>/<data>-<model>/<mode>-seed<seed>/` and continues there if it was killed. The epoch is chosen on
the validation part; the test part is read once, at the end.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from services.vision.preprocess import ClassificationPreprocessing
from services.vision.training.data import AugmentedBatches, Photos, TensorBatches
from services.vision.training.losses import smoothed_cross_entropy
from services.vision.training.models import MODELS
from services.vision.training.models.classifier import Classifier
from services.vision.training.tasks import TASKS, Task
from shared.artifacts import write_atomically
from shared.training.checkpoint import save_weights
from shared.training.curves import draw_curves
from shared.training.loop import Fit, FitConfig, FitResult, Score
from shared.training.memory import keep_freed_memory
from shared.training.metrics import classify, torch_predictor
from shared.training.seed import seed_everything

LOG = logging.getLogger("usagi.train")

HEAD_FIT = FitConfig(
    epochs=40, learning_rate=3e-3, weight_decay=1e-2, ema_decay=0.0, warmup_share=0.05, checkpoint_every=0
)
"""The linear classifier on cached features; seconds."""
FINETUNE_FIT = FitConfig(epochs=7, learning_rate=2e-4, ema_decay=0.99, checkpoint_every=36)
SCRATCH_FIT = dataclasses.replace(FINETUNE_FIT, learning_rate=2e-3, weight_decay=5e-2)


@dataclass(frozen=True)
class TrainConfig:
    """Trains a classifier and writes its run folder."""

    mode: Literal["scratch", "frozen", "finetune"] = "finetune"
    """What learns: everything from random weights, the classifier only, or everything from ImageNet weights."""
    data: Literal["flowers", "fashion"] = "flowers"
    """What to learn: five flowers on photos, or ten kinds of clothes (Fashion-MNIST)."""
    model: str = "efficientnet-lite0"
    """Network, by its name in the registry."""
    seed: int = 0
    """Of initialisation, order, augmentation and dropout."""
    epochs: int | None = None
    """Passes over the training part; the mode's own number if not given."""
    learning_rate: float | None = None
    """Peak of the schedule; the mode's own if not given."""
    batch: int = 32
    """Photos in a step."""
    train_size: int = 160
    """Side of the training crops in pixels in the first epochs, which cost half of what 224 pixels cost."""
    final_epochs: int = 3
    """Last epochs, which train at the size of serving; without them the answers at 224 pixels lack confidence."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes."""
    bfloat16: bool = False
    """Compute in bfloat16: 1.6 to 1.8 times as fast for plain convolutions on a CPU that knows it, slower for
    depthwise ones."""
    threads: int = 2
    """CPU threads."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    quick: bool = False
    """A few pictures and one epoch: shows in under three minutes that everything works."""

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
        name = f"{self.mode}-seed{self.seed}" + ("-quick" if self.quick else "")
        return self.runs / f"{self.data}-{self.model}" / name

    @property
    def fit(self) -> FitConfig:
        """The mode's schedule with what the command line changed."""
        fit = {"scratch": SCRATCH_FIT, "frozen": HEAD_FIT, "finetune": FINETUNE_FIT}[self.mode]
        epochs = self.epochs or (min(fit.epochs, 1) if self.quick and self.mode != "frozen" else fit.epochs)
        rate = self.learning_rate or fit.learning_rate
        return dataclasses.replace(fit, epochs=epochs, learning_rate=rate, bfloat16=self.bfloat16)

    def size_at(self, epoch: int) -> int:
        """Side of the training crops in an epoch (progressive resizing, Tan & Le 2021; FixRes, Touvron et al. 2019)."""
        full = self.preprocessing.size
        return min(self.train_size, full) if epoch < self.fit.epochs - self.final_epochs else full

    @property
    def command(self) -> str:
        """The command line that makes this run again, without paths of the machine."""
        words = ["python -m services.vision.training.train", f"--mode {self.mode}", f"--seed {self.seed}"]
        default = TrainConfig()
        for name in (
            "data",
            "model",
            "epochs",
            "learning_rate",
            "batch",
            "train_size",
            "final_epochs",
            "label_smoothing",
            "threads",
        ):
            if getattr(self, name) != getattr(default, name):
                words.append(f"--{name.replace('_', '-')} {getattr(self, name)}")
        words += ["--bfloat16"] if self.bfloat16 else []
        return " ".join([*words, "--quick"] if self.quick else words)


@dataclass(frozen=True)
class Parts:
    """The three parts of the data."""

    train: Photos
    val: Photos
    test: Photos


@dataclass(frozen=True)
class RunResult:
    """What a run achieved; `result.json` in its folder."""

    mode: str
    model: str
    seed: int
    command: str
    accuracy: float
    accuracy_val: float
    test_photos: int
    val_photos: int
    best_epoch: int
    wall_seconds: float
    threads: int


def load_parts(quick: bool, task: Task = TASKS["flowers"]) -> Parts:
    """Decodes all pictures, or few of them with `--quick`."""
    train, val, test = (task.load(split) for split in ("train", "val", "test"))
    if not quick:
        return Parts(train, val, test)
    return Parts(*(part.take(count) for part, count in zip((train, val, test), task.quick, strict=True)))


def validator(photos: Photos, config: ClassificationPreprocessing) -> Validator:
    """A validation on photos as serving would see them."""
    return Validator(np.stack(list(photos.tensors(config))), photos.labels)


class Validator:
    """Scores a model by accuracy; equal accuracies are ordered by the cross-entropy."""

    def __init__(self, inputs: np.ndarray, labels: np.ndarray) -> None:
        self.inputs, self.labels = inputs, labels

    def __call__(self, model: nn.Module) -> Score:
        """Accuracy and cross-entropy of a model in eval mode."""
        result = classify(torch_predictor(model), self.inputs, self.labels)
        loss = result.cross_entropy
        return Score(result.accuracy - 1e-4 * loss, {"val_accuracy": result.accuracy, "val_loss": loss})


def fit_head(model: Classifier, parts: Parts, config: TrainConfig, fit: FitConfig, folder: Path) -> FitResult:
    """Trains the classifier alone, on features that are computed once."""
    LOG.info("features of %d photos", len(parts.train) + len(parts.val))
    train, val = (_features(model, photos, config) for photos in (parts.train, parts.val))
    source = TensorBatches(train, torch.from_numpy(parts.train.labels), batch=64, seed=config.seed)
    head = nn.Linear(model.classifier.in_features, model.classifier.out_features)
    nn.init.zeros_(head.bias)
    run = Fit(
        head,
        source,
        smoothed_cross_entropy(config.label_smoothing),
        Validator(val.numpy(), parts.val.labels),
        fit,
        folder,
        fingerprint=config.command,
    )
    result = run.run()
    model.classifier.load_state_dict(head.state_dict())
    return result


def _features(model: Classifier, photos: Photos, config: TrainConfig) -> Tensor:
    predict = torch_predictor(_FeatureExtractor(model))
    return torch.from_numpy(classify(predict, photos.tensors(config.preprocessing), photos.labels).logits)  # [N, 1280]


class _FeatureExtractor(nn.Module):
    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model.features(image)


def freeze_batch_norm(model: nn.Module) -> None:
    """Training mode, but BatchNorm normalises by its stored statistics: small batches would only disturb them."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def fit_all(model: Classifier, parts: Parts, config: TrainConfig) -> FitResult:
    """Trains every weight on augmented crops."""
    source = AugmentedBatches(
        parts.train,
        config.preprocessing,
        size_at=config.size_at,
        batch=config.batch,
        seed=config.seed,
        augmentation=config.task.augmentation,
    )
    run = Fit(
        model,
        source,
        smoothed_cross_entropy(config.label_smoothing),
        validator(parts.val, config.preprocessing),
        config.fit,
        config.folder,
        prepare=nn.Module.train if config.mode == "scratch" else freeze_batch_norm,
        fingerprint=config.command,
    )
    return run.run()


def train(config: TrainConfig) -> RunResult:
    """Trains as configured, measures on the test part once, and writes `weights.pt`, `result.json` and `curves.png`."""
    started = time.monotonic()
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    parts = load_parts(config.quick, config.task)
    seed_everything(config.seed)
    model = MODELS.get(config.model)(len(config.task.labels), config.mode != "scratch")
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.mode == "frozen":
        fitted = fit_head(model, parts, config, config.fit, config.folder)
    else:
        if config.mode == "finetune" and not (config.folder / "last.pt").exists():
            fit_head(model, parts, config, HEAD_FIT, config.folder / "head")
            seed_everything(config.seed)
        fitted = fit_all(model, parts, config)
    LOG.info("trained in %.0f s", time.monotonic() - started)
    return finish_run(model, fitted, parts, config)


class RunConfig(Protocol):
    """What every run of this service can say about itself."""

    @property
    def mode(self) -> str:
        """How the run learns."""
        ...

    @property
    def model(self) -> str:
        """Network, by its name in the registry."""
        ...

    @property
    def seed(self) -> int:
        """Of all that is random."""
        ...

    @property
    def threads(self) -> int:
        """CPU threads."""
        ...

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        ...

    @property
    def command(self) -> str:
        """The command line that makes it again."""
        ...

    @property
    def preprocessing(self) -> ClassificationPreprocessing:
        """What the network sees."""
        ...


def finish_run(model: nn.Module, fitted: FitResult, parts: Parts, config: RunConfig) -> RunResult:
    """Measures on validation and, once, on test; writes `weights.pt`, `result.json` and `curves.png`."""
    predict = torch_predictor(model)
    val, test = (classify(predict, p.tensors(config.preprocessing), p.labels) for p in (parts.val, parts.test))
    result = RunResult(
        mode=config.mode,
        model=config.model,
        seed=config.seed,
        command=config.command,
        accuracy=test.accuracy,
        accuracy_val=val.accuracy,
        test_photos=len(parts.test),
        val_photos=len(parts.val),
        best_epoch=fitted.best_epoch,
        wall_seconds=round(fitted.wall_seconds, 1),
        threads=config.threads,
    )
    save_weights(config.folder / "weights.pt", model)
    write_atomically(config.folder / "result.json", json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    draw_curves(config.folder, title=f"{config.model}, {config.mode}, seed {config.seed}")
    return result


def main(config: TrainConfig) -> None:
    """Trains and says what came out."""
    result = train(config)
    test, val = f"{result.accuracy:.4f} (n={result.test_photos})", f"{result.accuracy_val:.4f} (n={result.val_photos})"
    print(f"{config.folder}: test accuracy {test}, validation {val}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(TrainConfig, description=__doc__))
