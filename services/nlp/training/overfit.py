"""Shows that the translators can learn: `python -m services.nlp.training.overfit`, a part of `make verify`.

A small Transformer and a small GRU with attention learn 2,000 pairs by heart. One whose loss stays at MAX_NATS a token
or above, or that takes longer than MAX_SECONDS of one thread's time, has something wrong with its gradients, its masks
or its targets; then the program ends with status 1.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from services.nlp.training.data import Encoded, PairBatches, divide, encode_pairs
from services.nlp.training.losses import token_cross_entropy
from services.nlp.training.train import TrainConfig, build, make_vocabularies
from shared.training.loop import Fit, FitConfig, Score
from shared.training.seed import seed_everything

MAX_NATS, MAX_SECONDS = 1.0, 120.0
SIZES = TrainConfig(division="report", merges=0, width=128, feed_forward=256, layers=2, dropout=0.0, batch=50)
NETWORKS = {
    "Transformer": (dataclasses.replace(SIZES, architecture="transformer"), 2e-3),
    "GRU with attention": (dataclasses.replace(SIZES, architecture="gru-attention"), 4e-3),
}
"""Configuration and learning rate by title."""


@dataclass(frozen=True)
class OverfitConfig:
    """Trains small translators until they know their pairs by heart."""

    pairs: int = 2000
    """First pairs of the report's training part."""
    epochs: int = 9
    """Passes over them."""


@dataclass(frozen=True)
class Learnt:
    """What came out: nats a token of the pairs themselves, and seconds of the thread."""

    title: str
    nats: float
    seconds: float

    @property
    def good(self) -> bool:
        """Whether the gate lets it pass."""
        return self.nats < MAX_NATS and self.seconds < MAX_SECONDS


class LossOfAll:
    """Scores a network by the loss of the very pairs that it learns."""

    def __init__(self, pairs: Encoded) -> None:
        self.batches, self.loss = PairBatches(pairs, 100, seed=0), token_cross_entropy()

    @torch.inference_mode()
    def __call__(self, model: nn.Module) -> Score:
        """Less is better, so the score is negative."""
        batches = (self.batches.batch(0, step) for step in range(self.batches.steps_per_epoch))
        total, count = 0.0, 0
        for inputs, targets in batches:
            tokens = int((targets != 0).sum())
            total, count = total + self.loss(model(inputs), targets).item() * tokens, count + tokens
        return Score(-total / count, {"nats": total / count})


def learn(title: str, config: OverfitConfig) -> Learnt:
    """Trains one network of NETWORKS."""
    sizes, learning_rate = NETWORKS[title]
    pairs = divide(sizes.division)[0].take(range(config.pairs))
    vocabularies = make_vocabularies(pairs, sizes.merges)
    encoded = encode_pairs(pairs, vocabularies)
    seed_everything(0)
    fit = FitConfig(
        epochs=config.epochs, learning_rate=learning_rate,
        schedule="constant",
        warmup_share=0.0, weight_decay=0.0, beta2=0.98, fused=True, ema_decay=0.0,
        checkpoint_every=0,
    )  # fmt: skip
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        batches, model = PairBatches(encoded, sizes.batch, seed=0), build(sizes, vocabularies)
        result = Fit(model, batches, token_cross_entropy(), LossOfAll(encoded), fit, Path(folder)).run()
    return Learnt(title, -result.best_score, time.process_time() - started)


def overfit(config: OverfitConfig, console: Console) -> bool:
    """Trains all, prints a table and says whether all pass."""
    torch.set_num_threads(1)
    table = Table("network", "nats a token", "seconds", "verdict")
    learnt = [learn(title, config) for title in NETWORKS]
    for one in learnt:
        verdict = "[green]learns[/green]" if one.good else f"[red]not below {MAX_NATS:g} in {MAX_SECONDS:g} s[/red]"
        table.add_row(one.title, f"{one.nats:.3f}", f"{one.seconds:.0f}", verdict)
    console.print(table)
    return all(one.good for one in learnt)


def main(config: OverfitConfig) -> None:
    """Trains and ends with status 1 if one does not learn."""
    sys.exit(0 if overfit(config, Console()) else 1)


if __name__ == "__main__":
    main(tyro.cli(OverfitConfig, description=__doc__))
