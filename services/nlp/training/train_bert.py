"""Trains BERT: `python -m services.nlp.training.train_bert --corpus english --seed 0`.

A step is 64 single sentences and 16 pairs; an epoch is 300 steps. Validation masks the held-back sentences and pairs
once and for all; its loss, gaps and next sentence together, chooses the epoch. The figures at the end are those of four
maskings of the first 1,000 held-back sentences and of every held-back pair.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from services.nlp.tokenizers.wordpiece import WordPieceTokenizer, train_wordpiece
from services.nlp.training.bert_batches import UNASKED, EncodedReading, Masked, MaskedBatches, Masker, encode_reading
from services.nlp.training.bert_data import CorpusName, load_reading
from services.nlp.training.models.bert import Bert, BertConfig
from shared.artifacts import write_atomically
from shared.training.checkpoint import save_weights
from shared.training.command import command_line
from shared.training.curves import draw_curves
from shared.training.loop import Fit, FitConfig, Score
from shared.training.memory import keep_freed_memory
from shared.training.seed import sample_rng, seed_everything

LOG = logging.getLogger("usagi.train")
STEPS_PER_EPOCH = 300
HELD_SINGLES, VALIDATED_PAIRS = 1000, 320
MASKINGS = 4
ROWS = 64
VOCABULARY = "vocabulary.json"


@dataclass(frozen=True)
class TrainBertConfig:
    """Trains BERT and writes its run folder."""

    corpus: CorpusName = "english"
    """What to read."""
    seed: int = 0
    """Of initialisation, batches, gaps and dropout."""
    epochs: int = 10
    """Times 300 steps."""
    learning_rate: float = 1e-3
    """Peak of the schedule."""
    singles: int = 64
    """Single sentences in a step."""
    pairs: int = 16
    """Pairs in a step."""
    pieces: int = 3000
    """Of the vocabulary."""
    min_count: int = 1
    """Characters that occur less often are unknown."""
    context: int = 128
    """Longest input."""
    width: int = 128
    """Of the network."""
    layers: int = 4
    """Of the network."""
    heads: int = 4
    """Of each attention."""
    dropout: float = 0.1
    """Of embeddings, attention weights and every part's output."""
    threads: int = 1
    """CPU threads."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    quick: bool = False
    """20 steps of a small network on a small vocabulary: shows in under a minute that everything works."""

    @property
    def name(self) -> str:
        """Of the model."""
        return f"{self.corpus}-bert"

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
            warmup_share=min(0.5, 200 / (self.epochs * STEPS_PER_EPOCH)),
            beta2=0.98,
            fused=True,
            ema_decay=0.99,
            checkpoint_every=100,
        )

    @property
    def command(self) -> str:
        """The command line that makes this run again, without paths of the machine."""
        return command_line("services.nlp.training.train_bert", self, ("corpus", "seed"))


class Pretraining(nn.Module):
    """BERT with its two losses: batches in, `[2]` out, the mean over gaps and the mean over pairs, in nats."""

    def __init__(self, bert: Bert) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, parts: list[Masked]) -> Tensor:
        """See the class."""
        results = [run_part(self.bert, part) for part in parts]
        gaps, pieces, asked, labels = (torch.cat(kind) for kind in zip(*results, strict=True))
        follows = F.cross_entropy(asked, labels) if len(labels) else gaps.new_zeros(())
        return torch.stack((F.cross_entropy(gaps, pieces), follows))


def run_part(bert: Bert, part: Masked) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits `[N, V]` and targets `[N]` of the gaps, and logits `[P, 2]` and targets `[P]` of the pairs."""
    hidden = bert(part.tokens, part.segments)
    chosen, asked = part.targets != UNASKED, part.follows != UNASKED
    return bert.fill(hidden[chosen]), part.targets[chosen], bert.follows(hidden[asked]), part.follows[asked]


@torch.inference_mode()
def measure(bert: Bert, parts: list[Masked], prefix: str = "") -> dict[str, float]:
    """Loss and accuracy of gaps (`nats`, `accuracy`) and, where there are pairs, `next_nats` and `next_accuracy`."""
    sums = np.zeros(6)
    for part in parts:
        gaps, pieces, asked, labels = run_part(bert, part)
        sums += [*_sums(gaps, pieces), *_sums(asked, labels)]
    measures = {f"{prefix}nats": sums[0] / sums[2], f"{prefix}accuracy": sums[1] / sums[2]}
    if sums[5]:
        measures |= {f"{prefix}next_nats": sums[3] / sums[5], f"{prefix}next_accuracy": sums[4] / sums[5]}
    return {name: float(value) for name, value in measures.items()}


def _sums(logits: Tensor, targets: Tensor) -> tuple[float, float, float]:
    """Sum of the losses, number right, number of all."""
    loss = F.cross_entropy(logits, targets, reduction="sum").item() if len(targets) else 0.0
    return loss, (logits.argmax(-1) == targets).sum().item(), float(len(targets))


class HeldBack:
    """The held-back texts with gaps, always the same ones: `singles` and `pairs`, in parts of ROWS rows."""

    def __init__(self, reading: EncodedReading, masker: Masker, *, maskings: int, pairs: int) -> None:
        sentences = reading.singles[:HELD_SINGLES] * maskings
        borders = reading.borders
        rng = sample_rng(0, 0, 0)
        order = rng.permutation(len(borders))[:pairs]
        drawn = [borders[index] for index in order] * (1 if reading.singles else maskings)
        self.singles = [masker.singles(sentences[at : at + ROWS], rng) for at in range(0, len(sentences), ROWS)]
        self.pairs = [masker.pairs(reading, drawn[at : at + ROWS], rng) for at in range(0, len(drawn), ROWS)]

    def gaps(self, parts: list[Masked]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Tokens, segments and targets of parts."""
        return [(part.tokens, part.segments, part.targets) for part in parts]

    def follows(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Tokens, segments and labels of the pairs."""
        return [(part.tokens, part.segments, part.follows) for part in self.pairs]

    def measure(self, bert: Bert) -> dict[str, float]:
        """`nats` and `accuracy` of the gaps in single sentences, `pairs_…` of those in pairs, `pairs_next_accuracy`."""
        measures = measure(bert, self.singles) if self.singles else {}
        return measures | measure(bert, self.pairs, "pairs_")

    def __call__(self, model: nn.Module) -> Score:
        """For the fit loop."""
        measures = self.measure(model.bert)  # type: ignore[arg-type]
        losses = [measures[name] for name in ("nats", "pairs_nats", "pairs_next_nats") if name in measures]
        return Score(-sum(losses), {name.replace("nats", "loss"): value for name, value in measures.items()})


def baselines(train: EncodedReading, held: HeldBack, size: int) -> dict[str, float]:
    """What guessing gives on the same gaps: uniformly, by frequency (add-one), and always the most frequent piece."""
    found: dict[str, float] = {"uniform": math.log(size)}
    for prefix, ids, parts in (
        ("", train.singles, held.singles),
        ("pairs_", [sentence for document in train.documents for sentence in document], held.pairs),
    ):
        if parts:
            counts = np.bincount(np.concatenate([np.array(one) for one in ids if one]), minlength=size) + 1.0
            pieces = torch.cat([part.targets[part.targets != UNASKED] for part in parts]).numpy()
            found[f"{prefix}unigram"] = float(-np.log(counts / counts.sum())[pieces].mean())
            found[f"{prefix}most_frequent_accuracy"] = float((pieces == counts.argmax()).mean())
    labels = torch.cat([part.follows for part in held.pairs]).float().mean().item()
    return found | {"next_majority_accuracy": max(labels, 1 - labels)}


def prepare(config: TrainBertConfig) -> tuple[WordPieceTokenizer, EncodedReading, EncodedReading]:
    """The vocabulary, learnt once for a run folder, and the ids of what trains and of what is held back."""
    reading, held = load_reading(config.corpus)
    path = config.folder / VOCABULARY
    if path.exists():
        tokenizer = WordPieceTokenizer.from_json(path.read_text(encoding="utf-8"))
    else:
        words = reading.words()[:20_000] if config.quick else reading.words()
        tokenizer = train_wordpiece(words, 300 if config.quick else config.pieces, config.min_count)
        write_atomically(path, tokenizer.to_json())
    if config.quick:
        held = dataclasses.replace(held, singles=held.singles[:100], documents=held.documents[:100])
    return tokenizer, encode_reading(reading, tokenizer), encode_reading(held, tokenizer)


def held_back_parts(corpus: CorpusName, tokenizer: WordPieceTokenizer, context: int, *, quick: bool) -> HeldBack:
    """What judges a finished run: MASKINGS of the first held-back sentences, and every held-back pair."""
    held = encode_reading(load_reading(corpus)[1], tokenizer)
    if quick:
        held = EncodedReading(held.singles[:100], held.documents[:100])
    return HeldBack(held, Masker(tokenizer, context), maskings=1 if quick else MASKINGS, pairs=len(held.borders))


def sizes(config: TrainBertConfig, tokenizer: WordPieceTokenizer) -> BertConfig:
    """Of the network."""
    whole = BertConfig(
        len(tokenizer), config.context, config.width, config.layers, config.heads, config.dropout, tokenizer.pad
    )
    return dataclasses.replace(whole, width=32, layers=2) if config.quick else whole


def train(config: TrainBertConfig) -> dict[str, object]:
    """Trains as configured; writes `weights.pt`, `vocabulary.json`, `result.json` and `curves.png`."""
    started = time.monotonic()
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    tokenizer, reading, held = prepare(config)
    seed_everything(config.seed)
    masker = Masker(tokenizer, config.context)
    model = Pretraining(Bert(sizes(config, tokenizer)))
    LOG.info("%d weights, %.0f s so far", sum(p.numel() for p in model.parameters()), time.monotonic() - started)
    steps = 20 if config.quick else STEPS_PER_EPOCH
    fitted = Fit(
        model,
        MaskedBatches(reading, masker, config.singles, config.pairs, config.seed, steps),
        lambda losses, gaps: losses.sum(),
        HeldBack(held, masker, maskings=1, pairs=VALIDATED_PAIRS),
        config.fit,
        config.folder,
        fingerprint=config.command,
    ).run()
    judged = held_back_parts(config.corpus, tokenizer, config.context, quick=config.quick)
    result: dict[str, object] = {
        "command": config.command,
        "seed": config.seed,
        "corpus": config.corpus,
        "measures": judged.measure(model.bert.eval()),
        "baselines": baselines(reading, judged, len(tokenizer)),
        "best_epoch": fitted.best_epoch,
        "wall_seconds": round(fitted.wall_seconds, 1),
        "network": dataclasses.asdict(model.bert.config),
    }
    save_weights(config.folder / "weights.pt", model.bert)
    write_atomically(config.folder / "result.json", json.dumps(result, indent=2) + "\n")
    draw_curves(config.folder, title=f"BERT on {config.corpus}, seed {config.seed}")
    return result


def main(config: TrainBertConfig) -> None:
    """Trains and says what came out."""
    result = train(config)
    print(f"{config.folder}: {result['measures']}; guessing {result['baselines']}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(TrainBertConfig, description=__doc__))
