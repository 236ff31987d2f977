"""Trains a language model: `python -m services.nlp.training.train_gpt --text shakespeare --seed 0`.

With `--merges 512` it reads pieces of byte-pair encoding; its nats are still those of a character.
The first nine tenths of the text train, the last tenth validates; its loss chooses the epoch (here 250 steps on random
windows), and at the end is measured on the whole tenth, each window with half a context before it that is not counted.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from services.nlp.tokenizers.characters import collect_characters
from services.nlp.tokenizers.special import SPECIAL_PIECES, UNK
from services.nlp.tokenizers.text_bpe import train_text_bpe
from services.nlp.tokenizers.texts import TextTokenizer
from services.nlp.training.losses import token_cross_entropy
from services.nlp.training.models.gpt import Gpt, GptConfig
from services.nlp.training.texts import TEXTS, held_back_text, training_text
from shared.artifacts import write_atomically
from shared.training.checkpoint import save_weights
from shared.training.command import command_line
from shared.training.curves import draw_curves
from shared.training.loop import Fit, FitConfig, Score
from shared.training.memory import keep_freed_memory
from shared.training.seed import sample_rng, seed_everything

LOG = logging.getLogger("usagi.train")
STEPS_PER_EPOCH = 250
VALIDATION_WINDOWS = 64


@dataclass(frozen=True)
class TrainGptConfig:
    """Trains a language model and writes its run folder."""

    text: Literal["shakespeare", "soseki"] = "shakespeare"
    """What to read."""
    seed: int = 0
    """Of initialisation, windows and dropout."""
    epochs: int = 14
    """Times 250 steps."""
    last_epoch: int | None = None
    """Stop after so many of them, where time is short; without it the same command goes on from there."""
    learning_rate: float = 3e-3
    """Peak of the schedule."""
    batch: int = 16
    """Windows in a step."""
    context: int = 128
    """Tokens in a window."""
    width: int = 128
    """Of the network."""
    layers: int = 4
    """Of the network."""
    heads: int = 4
    """Of each attention."""
    dropout: float = 0.0
    """Of embeddings, attention weights and every part's output."""
    min_count: int = 1
    """Characters that occur less often are one unknown, which is predicted and counted like any other."""
    merges: int = 0
    """Of byte-pair encoding; 0 reads character by character."""
    threads: int = 1
    """CPU threads."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    quick: bool = False
    """One epoch of a small network: shows in under three minutes that everything works."""

    @property
    def name(self) -> str:
        """Of the model."""
        return model_name(self.text, pieces=self.merges > 0)

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
            ema_decay=0.995,
            checkpoint_every=0,
        )

    @property
    def command(self) -> str:
        """The command line that makes this run again, without paths of the machine."""
        return command_line("services.nlp.training.train_gpt", self, ("text", "seed"))


def model_name(text: str, *, pieces: bool) -> str:
    """Name of the model of a text: `shakespeare-gpt` reads characters, `shakespeare-bpe-gpt` pieces."""
    return f"{text}-bpe-gpt" if pieces else f"{text}-gpt"


class Windows:
    """Random windows of a text, the same for the same (seed, epoch, step)."""

    def __init__(self, ids: Tensor, context: int, batch: int, seed: int, steps: int = STEPS_PER_EPOCH) -> None:
        self.ids, self.context, self.size, self.seed = ids, context, batch, seed
        self.steps_per_epoch = steps

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Tokens `[B, context]` and those that follow each."""
        starts = sample_rng(self.seed, epoch, step).integers(0, len(self.ids) - self.context, self.size)
        rows = torch.stack([self.ids[start : start + self.context + 1] for start in starts])
        return rows[:, :-1], rows[:, 1:]


class LossValidator:
    """Scores a model by its loss on windows spread over the held-back text."""

    def __init__(self, ids: Tensor, context: int) -> None:
        starts = np.linspace(0, len(ids) - context - 1, VALIDATION_WINDOWS).astype(int)
        self.rows = torch.stack([ids[start : start + context + 1] for start in starts])

    def __call__(self, model: nn.Module) -> Score:
        """Nats a token."""
        with torch.inference_mode():
            logits = model(self.rows[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), self.rows[:, 1:].flatten()).item()
        return Score(-loss, {"val_loss": loss})


@torch.inference_mode()
def held_out_loss(model: nn.Module, ids: Tensor, context: int, lengths: Tensor, batch: int = 32) -> float:
    """Nats a character over a whole text: windows move by half a context, and only their second half counts.

    Args:
        model: the language model.
        ids: the text.
        context: tokens in a window.
        lengths: `[V]`, characters of each token; a text in pieces has fewer tokens, each of which costs more.
        batch: windows in a run.
    """
    half = context // 2
    starts = range(0, len(ids) - context - 1, half)
    total, count = 0.0, 0
    for at in range(0, len(starts), batch):
        rows = torch.stack([ids[start : start + context + 1] for start in starts[at : at + batch]])
        logits = model(rows[:, :-1])[:, half:]
        total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1 + half :].flatten(), reduction="sum").item()
        count += int(lengths[rows[:, 1 + half :]].sum())
    return total / count


def token_lengths(tokenizer: TextTokenizer) -> Tensor:
    """Characters of each token `[V]`; a special one counts as one, which is what an unknown character is."""
    return torch.tensor([1] * len(SPECIAL_PIECES) + [len(piece) for piece in tokenizer.pieces[len(SPECIAL_PIECES) :]])


def character_baselines(config: TrainGptConfig) -> dict[str, float]:
    """`baselines` over characters, whatever the model reads: its nats are those of a character too."""
    tokenizer, train, held = divide(dataclasses.replace(config, merges=0))
    return baselines(train, held, len(tokenizer))


def baselines(train: Tensor, held: Tensor, size: int) -> dict[str, float]:
    """Nats a character of guessing: uniformly, by frequency, and by the character before (add-one)."""
    ones = torch.bincount(train, minlength=size).double() + 1
    pairs = torch.bincount(train[:-1] * size + train[1:], minlength=size * size).view(size, size).double() + 1
    unigram = -(ones / ones.sum()).log()[held].mean().item()
    bigram = -(pairs / pairs.sum(1, keepdim=True)).log()[held[:-1], held[1:]].mean().item()
    return {"uniform": math.log(len(Counter(train.tolist()))), "unigram": unigram, "bigram": bigram}


def divide(config: TrainGptConfig) -> tuple[TextTokenizer, Tensor, Tensor]:
    """The vocabulary, and the ids of the training and of the held-back part."""
    parts = training_text(config.text), held_back_text(config.text)
    tokenizer: TextTokenizer = (
        train_text_bpe(parts[0], config.merges, config.min_count)
        if config.merges
        else collect_characters(parts[0], config.min_count)
    )
    train, held = (torch.tensor(tokenizer.encode(part)) for part in parts)
    return tokenizer, train, held


def train(config: TrainGptConfig) -> dict[str, object]:
    """Trains as configured; writes `weights.pt`, `vocabulary.json`, `result.json` and `curves.png`."""
    started = time.monotonic()
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    tokenizer, reading, held = divide(config)
    write_atomically(config.folder / "vocabulary.json", tokenizer.to_json())
    seed_everything(config.seed)
    sizes = GptConfig(len(tokenizer), config.context, config.width, config.layers, config.heads, dropout=config.dropout)
    if config.quick:
        sizes = dataclasses.replace(sizes, width=96, layers=2)
    model = Gpt(sizes)
    LOG.info("%d weights, %.0f s so far", sum(p.numel() for p in model.parameters()), time.monotonic() - started)
    fitted = Fit(
        model,
        Windows(reading, config.context, config.batch, config.seed),
        token_cross_entropy(),
        LossValidator(held, config.context),
        config.fit,
        config.folder,
        last_epoch=config.last_epoch,
        fingerprint=dataclasses.replace(config, last_epoch=None).command,
    ).run()
    result = {
        "command": config.command,
        "seed": config.seed,
        "text": config.text,
        "unknown_share": (held == UNK).float().mean().item(),
        "nats": held_out_loss(model.eval(), held, config.context, token_lengths(tokenizer)),
        "best_epoch": fitted.best_epoch,
        "wall_seconds": round(fitted.wall_seconds, 1),
        "baselines": character_baselines(config),
        "network": dataclasses.asdict(sizes),
    }
    save_weights(config.folder / "weights.pt", model)
    write_atomically(config.folder / "result.json", json.dumps(result, indent=2) + "\n")
    draw_curves(config.folder, title=f"{TEXTS[config.text].title}, seed {config.seed}")
    return result


def main(config: TrainGptConfig) -> None:
    """Trains and says what came out."""
    result = train(config)
    print(f"{config.folder}: {result['nats']:.4f} nats a character held back; guessing {result['baselines']}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(TrainGptConfig, description=__doc__))
