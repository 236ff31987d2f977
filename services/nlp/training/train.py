"""Trains a translator from English to Japanese: `python -m services.nlp.training.train --seed 0`.

It learns from the corpus' train file alone. The epoch is chosen by the BLEU of free-running greedy translations of
held-back pairs; the dev file is read once, at the end. A run lives in `<runs>/<name>/seed<seed>/` and continues there
if it was killed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import nn

from services.nlp.tokenizers.bpe import train_bpe
from services.nlp.tokenizers.vocabularies import Tokenizer, Vocabularies
from services.nlp.tokenizers.words import count_words
from services.nlp.training.bleu import corpus_bleu
from services.nlp.training.data import Division, PairBatches, Pairs, divide, encode_pairs, load_pairs
from services.nlp.training.decode import greedy
from services.nlp.training.losses import token_cross_entropy
from services.nlp.training.models.transformer import Transformer, TransformerConfig
from shared.artifacts import write_atomically
from shared.training.checkpoint import save_weights
from shared.training.curves import draw_curves
from shared.training.loop import Fit, FitConfig, Score
from shared.training.memory import keep_freed_memory
from shared.training.seed import seed_everything

LOG = logging.getLogger("usagi.train")
MAX_PIECES = 60
"""Longest translation in validation, in pieces; the corpus has at most 16 words a sentence."""


@dataclass(frozen=True)
class TrainConfig:
    """Trains a translator and writes its run folder."""

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
    """Of the network (d_model)."""
    feed_forward: int = 1024
    """Width inside the feed-forward parts."""
    layers: int = 3
    """Of the encoder and of the decoder."""
    heads: int = 4
    """Of each attention."""
    dropout: float = 0.2
    """Of embeddings, attention weights and every part's output."""
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
        return FitConfig(
            epochs=3 if self.quick else self.epochs,
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
        words = ["python -m services.nlp.training.train"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("runs", "quick") and value != field.default:
                flag = field.name.replace("_", "-")
                words.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}")
        return " ".join([*words, "--quick"] if self.quick else words)


def make_vocabularies(pairs: Pairs, merges: int) -> Vocabularies:
    """Learns both vocabularies from the training part."""

    def make(sentences: list[list[str]]) -> Tokenizer:
        words = (word for sentence in sentences for word in sentence)
        return train_bpe(words, merges) if merges else count_words(words)

    return Vocabularies(make(pairs.english), make(pairs.japanese))


class BleuValidator:
    """Scores a model by the BLEU of its own greedy translations of held-back pairs."""

    def __init__(self, pairs: Pairs, vocabularies: Vocabularies) -> None:
        self.pairs, self.vocabularies = pairs, vocabularies
        self.encoded = encode_pairs(pairs, vocabularies)

    def __call__(self, model: nn.Module) -> Score:
        """BLEU in percent."""
        assert isinstance(model, Transformer)
        found = greedy(model, self.encoded.source, MAX_PIECES)
        bleu = corpus_bleu([self.vocabularies.japanese.decode(ids) for ids in found], self.pairs.japanese)
        return Score(bleu.score, {"val_bleu": round(bleu.score, 3)})


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
        PairBatches(encode_pairs(training, vocabularies), config.batch, config.seed),
        token_cross_entropy(config.label_smoothing),
        BleuValidator(held.take(range(min(500, len(held)))), vocabularies),
        config.fit,
        config.folder,
        last_epoch=config.last_epoch,
        fingerprint=dataclasses.replace(config, last_epoch=None).command,
    ).run()
    dev = BleuValidator(load_pairs("dev"), vocabularies)(model.eval())
    result = {
        "command": config.command,
        "seed": config.seed,
        "dev_greedy_bleu": dev.value,
        "val_bleu": fitted.best_score,
        "best_epoch": fitted.best_epoch,
        "wall_seconds": round(fitted.wall_seconds, 1),
        "network": dataclasses.asdict(model.config),
    }
    save_weights(config.folder / "weights.pt", model)
    write_atomically(config.folder / "result.json", json.dumps(result, indent=2) + "\n")
    draw_curves(config.folder, title=f"{config.name}, seed {config.seed}")
    return result


def build(config: TrainConfig, vocabularies: Vocabularies) -> Transformer:
    """The network for these vocabularies."""
    return Transformer(
        TransformerConfig(
            source_vocabulary=len(vocabularies.english),
            target_vocabulary=len(vocabularies.japanese),
            width=config.width,
            feed_forward=config.feed_forward,
            layers=config.layers,
            heads=config.heads,
            dropout=config.dropout,
        )
    )


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
