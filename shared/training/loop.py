"""The fit loop: one for every model of the suite.

It owns what must not be written twice: the cosine schedule, the weight average, selection on validation, checkpoints
and resuming, the log, the progress bar. A task brings its model, its batches, its loss and its score.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from shared.errors import ConfigurationError
from shared.training import checkpoint
from shared.training.ema import WeightAverage


class BatchSource(Protocol):
    """Batches by position: a pure function of (epoch, step), which is what makes a resume exact."""

    steps_per_epoch: int

    def batch(self, epoch: int, step: int) -> tuple[Any, Tensor]:
        """What the model takes (a tensor, or a tuple of several) and the targets of one step."""
        ...


@dataclass(frozen=True)
class FitConfig:
    """How long and how fast to train."""

    epochs: int = 10
    """Passes over the training part."""
    learning_rate: float = 3e-4
    """Peak of the schedule."""
    schedule: Literal["cosine", "inverse-sqrt", "constant"] = "cosine"
    """After the warm-up: half a cosine to zero; proportional to 1/sqrt(step), which may be stopped at any time; or the
    same all along."""
    warmup_share: float = 0.1
    """Share of all steps in which the learning rate rises from 0 to its peak."""
    weight_decay: float = 1e-2
    """AdamW's decoupled decay; biases and normalisation are not decayed."""
    beta2: float = 0.999
    """AdamW's memory of squared gradients; Transformers like a shorter one."""
    fused: bool = False
    """AdamW as one kernel, four times as fast on a CPU; it rounds otherwise than the one of several steps."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ema_decay: float = 0.99
    """Of the average of the weights that is validated and kept; 0 turns it off."""
    bfloat16: bool = False
    """Compute in bfloat16 where it is safe (autocast); weights stay float32."""
    checkpoint_every: int = 20
    """Steps between checkpoints; 0 writes one after each epoch only."""


@dataclass(frozen=True)
class Score:
    """Result of a validation: `value` decides (higher is better), `measures` are logged."""

    value: float
    measures: dict[str, float]


@dataclass(frozen=True)
class FitResult:
    """What came out: the kept epoch's validation score and the time it all took, over all resumes."""

    best_epoch: int
    best_score: float
    wall_seconds: float


def learning_rate_at(step: int, total: int, config: FitConfig) -> float:
    """Linear warm-up, then half a cosine to zero (Loshchilov & Hutter 2017, equation 5 without restarts), or
    `sqrt(warmup / step)` (Vaswani et al. 2017, equation 3), or nothing further."""
    warmup = int(total * config.warmup_share)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "inverse-sqrt":
        return config.learning_rate * math.sqrt(max(1, warmup) / (step + 1))
    if config.schedule == "constant":
        return config.learning_rate
    share = (step - warmup) / max(1, total - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and filters with decay, everything of one dimension (biases, normalisation) without."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


class Fit:
    """A run of training in a folder: `metrics.jsonl`, `last.pt` (to resume) and `best.pt` (weights of the kept epoch).

    Args:
        model: trained in place; on return it holds the kept epoch's weights.
        source: the training batches.
        loss: `(outputs, targets) -> scalar`.
        validate: scores a model in eval mode; never sees the test part.
        config: schedule and optimiser.
        folder: where the run lives; a run found there is continued.
        prepare: puts the model into its training mode before each epoch; `model.train()` if not given.
        last_epoch: stop after so many epochs of the schedule, if that is fewer; the same run may go on later.
        keep: which epoch's weights are kept: those that validated best, or the last.
        fingerprint: whatever else defines the run; a run of another definition is not continued.
    """

    def __init__(
        self,
        model: nn.Module,
        source: BatchSource,
        loss: Callable[[Tensor, Tensor], Tensor],
        validate: Callable[[nn.Module], Score],
        config: FitConfig,
        folder: Path,
        *,
        prepare: Callable[[nn.Module], object] = nn.Module.train,
        last_epoch: int | None = None,
        keep: Literal["best", "last"] = "best",
        fingerprint: str = "",
    ) -> None:
        if source.steps_per_epoch < 1:
            raise ConfigurationError("the training part has no full batch; use a smaller batch or more examples")
        self.model, self.source, self.loss, self.validate = model, source, loss, validate
        self.config, self.folder, self.prepare = config, folder, prepare
        self.keep = keep
        self.last_epoch = config.epochs if last_epoch is None else min(last_epoch, config.epochs)
        self.fingerprint = json.dumps({"fit": dataclasses.asdict(config), "run": fingerprint}, sort_keys=True)
        self.optimiser = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay),
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            fused=config.fused,
        )
        self.average = WeightAverage(model, config.ema_decay) if config.ema_decay else None
        self.progress = checkpoint.Progress()
        self.started = time.monotonic()

    def run(self) -> FitResult:
        """Trains to the end, from where the folder's last checkpoint stands."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        total = self.last_epoch * self.source.steps_per_epoch
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns) as bar:
            done = self.progress.epoch * self.source.steps_per_epoch + self.progress.step
            task = bar.add_task(self.folder.name, total=total, completed=done, note="")
            while self.progress.epoch < self.last_epoch:
                self._train_epoch(lambda loss: bar.update(task, advance=1, note=f"loss {loss:.3f}"))
                self._finish_epoch()
        self.model.load_state_dict(torch.load(self.folder / "best.pt", weights_only=True))
        return FitResult(self.progress.best_epoch, self.progress.best_score, self.progress.wall_seconds)

    def _train_epoch(self, report: Callable[[float], None]) -> None:
        self.prepare(self.model)
        for step in range(self.progress.step, self.source.steps_per_epoch):
            loss = self._train_step(self.progress.epoch, step)
            sums = self.progress.sums
            sums["loss"] = sums.get("loss", 0.0) + loss
            self.progress.step = step + 1
            report(sums["loss"] / self.progress.step)
            every = self.config.checkpoint_every
            if every and self.progress.step % every == 0:
                self._save()

    def _train_step(self, epoch: int, step: int) -> float:
        rate = learning_rate_at(
            epoch * self.source.steps_per_epoch + step, self.config.epochs * self.source.steps_per_epoch, self.config
        )
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        inputs, targets = self.source.batch(epoch, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bfloat16):
            outputs = self.model(inputs)
        loss = self.loss(outputs.float(), targets)
        if not torch.isfinite(loss):
            raise ConfigurationError(
                f"the loss is {loss.item()} at epoch {epoch}, step {step}; lower the learning rate"
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimiser.step()
        if self.average:
            self.average.update(self.model)
        return loss.item()

    def _finish_epoch(self) -> None:
        """Validates, logs, keeps the weights if they are the best so far, and moves on to the next epoch."""
        candidate = self.average.model if self.average else self.model
        score = self.validate(candidate.eval())
        epoch = self.progress.epoch
        if self.keep == "last" or score.value > self.progress.best_score:
            self.progress.best_epoch, self.progress.best_score = epoch, score.value
            checkpoint.save_weights(self.folder / "best.pt", candidate)
        train = {name: total / self.source.steps_per_epoch for name, total in self.progress.sums.items()}
        self._log({"epoch": epoch, **{f"train_{k}": v for k, v in train.items()}, **score.measures})
        self.progress.epoch, self.progress.step, self.progress.sums = epoch + 1, 0, {}
        self._save()

    def _log(self, line: dict[str, float]) -> None:
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "wall_seconds": round(self._elapsed(), 1)}) + "\n")

    def _elapsed(self) -> float:
        return self.progress.wall_seconds + time.monotonic() - self.started

    def _save(self) -> None:
        log = self.folder / "metrics.jsonl"
        self.progress.wall_seconds, self.started = self._elapsed(), time.monotonic()
        self.progress.log_bytes = log.stat().st_size if log.exists() else 0
        parts: dict[str, Any] = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}
        if self.average:
            parts |= {"average": self.average.model.state_dict(), "average_updates": self.average.updates}
        checkpoint.save_checkpoint(
            self.folder / "last.pt", parts=parts, progress=self.progress, fingerprint=self.fingerprint
        )

    def _resume(self) -> None:
        log = self.folder / "metrics.jsonl"
        if not (self.folder / "last.pt").exists():
            log.unlink(missing_ok=True)
            return
        parts, self.progress = checkpoint.load_checkpoint(self.folder / "last.pt", fingerprint=self.fingerprint)
        self.model.load_state_dict(parts["model"])
        self.optimiser.load_state_dict(parts["optimiser"])
        if self.average:
            self.average.model.load_state_dict(parts["average"])
            self.average.updates = parts["average_updates"]
        if log.exists():
            with log.open("r+b") as file:
                file.truncate(self.progress.log_bytes)


def read_log(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`."""
    lines: Iterable[str] = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
