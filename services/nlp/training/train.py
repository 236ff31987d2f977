"""Trains a translator from English to Japanese: `python -m services.nlp.training.train --seed 0`.

It learns from the corpus' train file alone. The epoch is chosen by the BLEU of free-running greedy translations of
held-back pairs, unless the recipe is the report's, which keeps the last; the dev file is read once, at the end. A run
lives in `<runs>/<name>/seed<seed>/` and continues there if it was killed. The course report's GRU:

    python -m services.nlp.training.train --architecture gru --recipe report --division report --merges 0 --batch 64
        --epochs 10 --teacher-forcing 0.2 --name enja-gru
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from services.nlp.tokenizers.bpe import train_bpe
from services.nlp.tokenizers.vocabularies import Tokenizer, Vocabularies
from services.nlp.tokenizers.words import count_words
from services.nlp.training.data import Division, PairBatches, Pairs, divide, encode_pairs, load_pairs
from services.nlp.training.losses import sentence_cross_entropy, token_cross_entropy
from services.nlp.training.networks import LOOKING, Architecture, Network, make_network
from services.nlp.training.validation import BleuValidator
from shared.artifacts import write_atomically
from shared.errors import ConfigurationError
from shared.training.checkpoint import save_weights
from shared.training.command import command_line
from shared.training.curves import draw_curves
from shared.training.loop import Fit, FitConfig
from shared.training.memory import keep_freed_memory
from shared.training.seed import seed_everything

LOG = logging.getLogger("usagi.train")


@dataclass(frozen=True)
class TrainConfig:
    """Trains a translator and writes its run folder."""

    architecture: Architecture = "transformer"
    """A Transformer, or the report's with its mistakes; GRUs without attention, with additive or dot products."""
    recipe: Literal["own", "report"] = "own"
    """`report`: Adam at a constant rate, no decay, clipping, averaging or smoothing, summed loss, the last epoch."""
    teacher_forcing: float = 1.0
    """Share of the batches in which the decoder of a GRU reads the target; in the others it reads what it said."""
    division: Division = "most"
    """Which pairs validate: 500 (`most`), or the report's 10,000 of 50,000 (`report`)."""
    merges: int = 4000
    """Byte-pair merges of each language; 0 means whole words, as in the report."""
    seed: int = 0
    """Of initialisation, order and dropout."""
    epochs: int = 20
    """Passes over the training part."""
    last_epoch: int | None = None
    """Stop after so many of them, where time is short; without it the same command goes on from there."""
    learning_rate: float = 1e-3
    """Peak of the schedule."""
    batch: int = 96
    """Pairs in a step."""
    width: int = 256
    """Of the network (d_model); of a GRU's states and embeddings."""
    feed_forward: int = 1024
    """Width inside the feed-forward parts of a Transformer."""
    layers: int = 3
    """Of a Transformer's encoder and of its decoder."""
    heads: int = 4
    """Of each attention."""
    dropout: float = 0.2
    """Of a Transformer's embeddings, attention weights and every part's output."""
    label_smoothing: float = 0.1
    """Share of the target spread over the vocabulary."""
    ema_decay: float = 0.9985
    """Of the average of the weights that is validated and kept."""
    bfloat16: bool = False
    """Compute in bfloat16: 2.4 times the speed of products on a CPU with AMX, half of it on one without."""
    threads: int = 1
    """CPU threads."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    name: str = "enja-transformer"
    """Of the run's folder."""
    quick: bool = False
    """2,000 pairs and three epochs: shows in under three minutes that everything works."""

    @property
    def folder(self) -> Path:
        """Where this run lives."""
        return self.runs / self.name / (f"seed{self.seed}" + ("-quick" if self.quick else ""))

    @property
    def fit(self) -> FitConfig:
        """The schedule."""
        epochs = 3 if self.quick else self.epochs
        if self.recipe == "report":
            return FitConfig(
                epochs=epochs,
                learning_rate=self.learning_rate,
                schedule="constant",
                warmup_share=0.0,
                weight_decay=0.0,
                fused=True,
                clip_norm=math.inf,
                ema_decay=0.0,
                checkpoint_every=0,
            )
        return FitConfig(
            epochs=epochs,
            learning_rate=self.learning_rate,
            warmup_share=0.06,
            weight_decay=0.01,
            beta2=0.98,
            fused=True,
            ema_decay=self.ema_decay,
            bfloat16=self.bfloat16,
            checkpoint_every=0,
        )

    @property
    def command(self) -> str:
        """The command line that makes this run again, without paths of the machine."""
        return command_line("services.nlp.training.train", self)


def make_vocabularies(pairs: Pairs, merges: int) -> Vocabularies:
    """Learns both vocabularies from the training part."""

    def make(sentences: list[list[str]]) -> Tokenizer:
        words = (word for sentence in sentences for word in sentence)
        return train_bpe(words, merges) if merges else count_words(words)

    return Vocabularies(make(pairs.english), make(pairs.japanese))


def train(config: TrainConfig) -> dict[str, object]:
    """Trains as configured; writes `weights.pt`, `vocabularies.json`, `result.json` and `curves.png`."""
    started = time.monotonic()
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    training, held = divide(config.division)
    if config.quick:
        training, held = training.take(range(2000)), held.take(range(100))
    vocabularies = load_vocabularies(config, training)
    seed_everything(config.seed)
    model = build(config, vocabularies)
    LOG.info("%d weights, %.0f s so far", sum(p.numel() for p in model.parameters()), time.monotonic() - started)
    fitted = Fit(
        model,
        PairBatches(encode_pairs(training, vocabularies), config.batch, config.seed, config.teacher_forcing),
        sentence_cross_entropy if config.recipe == "report" else token_cross_entropy(config.label_smoothing),
        BleuValidator(held.take(range(min(500, len(held)))), vocabularies),
        config.fit,
        config.folder,
        last_epoch=config.last_epoch,
        keep="last" if config.recipe == "report" else "best",
        fingerprint=dataclasses.replace(config, last_epoch=None).command,
    ).run()
    dev = BleuValidator(load_pairs("dev"), vocabularies)
    model.eval()
    result = {
        "command": config.command,
        "seed": config.seed,
        "architecture": config.architecture,
        "dev_greedy_bleu": dev(model).value,
        "dev_greedy_bleu_as_reported": dev.as_reported(model),
        "dev_forced_bleu_as_reported": dev.forced(model),
        "val_bleu": fitted.best_score,
        "best_epoch": fitted.best_epoch,
        "wall_seconds": round(fitted.wall_seconds, 1),
        "network": dataclasses.asdict(model.config),
    }
    save_weights(config.folder / "weights.pt", model)
    write_atomically(config.folder / "result.json", json.dumps(result, indent=2) + "\n")
    draw_curves(config.folder, title=f"{config.name}, seed {config.seed}")
    return result


def build(config: TrainConfig, vocabularies: Vocabularies) -> Network:
    """The network for these vocabularies.

    Raises:
        ConfigurationError: it is a Transformer without teacher forcing.
    """
    sizes: dict[str, Any] = {
        "source_vocabulary": len(vocabularies.english),
        "target_vocabulary": len(vocabularies.japanese),
        "width": config.width,
    }
    if config.architecture in LOOKING:
        return make_network(config.architecture, {**sizes, "attention": LOOKING[config.architecture]})
    if config.teacher_forcing != 1:
        raise ConfigurationError("teacher_forcing is not 1, but a Transformer reads all of the target at once; drop it")
    own = ("feed_forward", "layers", "heads", "dropout")
    return make_network(config.architecture, sizes | {name: getattr(config, name) for name in own})


def load_vocabularies(config: TrainConfig, training: Pairs) -> Vocabularies:
    """The run's vocabularies, learnt if they are not there yet."""
    path = config.folder / "vocabularies.json"
    if not path.exists():
        write_atomically(path, make_vocabularies(training, config.merges).to_json())
    return Vocabularies.from_json(path.read_text(encoding="utf-8"))


def main(config: TrainConfig) -> None:
    """Trains and says what came out."""
    result = train(config)
    print(f"{config.folder}: BLEU {result['dev_greedy_bleu']:.2f} on dev (greedy), {result['val_bleu']:.2f} held back")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(TrainConfig, description=__doc__))
