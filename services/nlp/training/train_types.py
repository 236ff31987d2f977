"""What pretraining is worth: `python -m services.nlp.training.train_types`, after train_bert.

Sentences are sorted into question, command and statement from 100 and from 1,000 labels, by the pretrained BERT, by the
same network from random weights, both trained as a whole, and by a head on the pretrained one left as it is; three
seeds each draw other labels. Each way has the better of two learning rates, by 300 validation sentences; the test has
750 that no BERT ever saw. That is the study (`--study`); without it, only the head that ships is trained, on all
labels.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from services.nlp.tokenizers.wordpiece import WordPieceTokenizer
from services.nlp.training.bert_batches import rows_of
from services.nlp.training.bert_graphs import TypeHead
from services.nlp.training.models.bert import Bert, BertConfig
from services.nlp.training.publishing import read_result
from services.nlp.training.sentence_types import LABELS, Labelled, load_types
from services.nlp.training.train_bert import VOCABULARY
from shared.artifacts import write_atomically
from shared.training.checkpoint import save_weights
from shared.training.memory import keep_freed_memory
from shared.training.seed import epoch_order, seed_everything

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LOG = logging.getLogger("usagi.train")
Way = Literal["pretrained", "random", "frozen"]
WAYS: tuple[Way, ...] = ("pretrained", "random", "frozen")
RATES = {"pretrained": (1e-4, 4e-4), "random": (4e-4, 1e-3), "frozen": (1e-3, 4e-3)}
BATCH = 20
LABEL_COUNTS = (100, 1000)


@dataclass(frozen=True)
class TrainTypesConfig:
    """Compares fine-tuning with training from random weights, and trains the head that ships."""

    seed: int = 0
    """Of the pretrained run."""
    labels: tuple[int, ...] = LABEL_COUNTS
    """Numbers of labels."""
    seeds: int = 3
    """Draws of labels for each number."""
    steps: int = 150
    """Of each training; of the head that ships, ten times as many."""
    threads: int = 1
    """CPU threads."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    study: bool = False
    """Compare, instead of training the head that ships; writes `study.json` and `transfer.png`."""
    quick: bool = False
    """Few steps, on a `--quick` run of BERT."""

    @property
    def source(self) -> Path:
        """The run of BERT that was pretrained."""
        return self.runs / "english-bert" / (f"seed{self.seed}" + ("-quick" if self.quick else ""))

    @property
    def folder(self) -> Path:
        """Where this run lives."""
        return self.runs / "english-bert-types" / self.source.name

    @property
    def command(self) -> str:
        """The command line that makes this run again, without paths of the machine."""
        words = ["python -m services.nlp.training.train_types", f"--seed {self.seed}"]
        words += ["--study"] if self.study else []
        words += [f"--labels {' '.join(map(str, self.labels))}"] if self.study and self.labels != LABEL_COUNTS else []
        return " ".join([*words, "--quick"] if self.quick else words)


class TypeClassifier(nn.Module):
    """BERT with a head for classes; `frozen` trains the head alone."""

    def __init__(self, bert: Bert, *, frozen: bool = False) -> None:
        super().__init__()
        self.bert, self.frozen = bert, frozen
        self.head = TypeHead(bert.config.width, len(LABELS))
        for weight in bert.parameters():
            weight.requires_grad_(not frozen)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[B, T]` → logits `[B, classes]`."""
        hidden = self.bert(tokens, torch.zeros_like(tokens))
        answer: Tensor = self.head(hidden, tokens != self.bert.config.pad)
        return answer

    def train(self, mode: bool = True) -> TypeClassifier:
        """What is frozen drops nothing out."""
        super().train(mode)
        if self.frozen:
            self.bert.eval()
        return self


@dataclass(frozen=True)
class Task:
    """The sentences as tokens `[N, T]` with their labels `[N]`, of each part."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def few(self, count: int, seed: int) -> Task:
        """The same with so many labels."""
        order = torch.from_numpy(np.random.default_rng((seed, count)).permutation(len(self.train[1]))[:count])
        return dataclasses.replace(self, train=(self.train[0][order], self.train[1][order]))


def load_task(tokenizer: WordPieceTokenizer, context: int) -> Task:
    """The three parts as tensors."""
    return Task(*(_tensors(part, tokenizer, context) for part in load_types()))


def _tensors(part: Labelled, tokenizer: WordPieceTokenizer, context: int) -> tuple[Tensor, Tensor]:
    tokens, _ = rows_of([(tokenizer.encode(words), ()) for words in part.sentences], tokenizer, context)
    return torch.from_numpy(tokens), torch.tensor(part.labels)


def load_pretrained(folder: Path) -> Bert:
    """The BERT of a finished run."""
    bert = Bert(BertConfig(**read_result(folder)["network"]))
    bert.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return bert


def fit(model: TypeClassifier, part: tuple[Tensor, Tensor], rate: float, steps: int, seed: int) -> TypeClassifier:
    """Trains with AdamW: a tenth of the steps warms up, then the rate falls evenly to 0."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, fused=True)
    tokens, labels = part
    model.train()
    per_epoch = max(1, len(labels) // BATCH)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(10 * (step + 1) / steps, (steps - step) / (0.9 * steps), 1)
        at = step % per_epoch * BATCH
        chosen = torch.from_numpy(epoch_order(seed, step // per_epoch, len(labels))[at : at + BATCH])
        rows = tokens[chosen]
        rows = rows[:, (rows != model.bert.config.pad).any(0)]
        loss = F.cross_entropy(model(rows), labels[chosen])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return model


@torch.inference_mode()
def accuracy(model: TypeClassifier, part: tuple[Tensor, Tensor]) -> float:
    """Share of the sentences whose label is the most probable one."""
    model.eval()
    found = torch.cat([model(rows).argmax(-1) for rows in torch.split(part[0], 125)])
    return (found == part[1]).float().mean().item()


def run_way(way: Way, source: Path, task: Task, steps: int, seed: int) -> float:
    """Test accuracy of one way, its learning rate chosen on the validation part."""
    judged: list[tuple[float, float]] = []
    for rate in RATES[way]:
        seed_everything(seed)
        bert = load_pretrained(source)
        model = TypeClassifier(Bert(bert.config) if way == "random" else bert, frozen=way == "frozen")
        fit(model, task.train, rate, steps, seed)
        judged.append((accuracy(model, task.validation), accuracy(model, task.test)))
    return max(judged)[1]


def study(config: TrainTypesConfig, task: Task) -> dict[str, dict[str, list[float]]]:
    """Test accuracies by number of labels and way, one for each seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for count in config.labels:
        found[str(count)] = {way: [] for way in WAYS}
        for seed in range(config.seeds):
            few = task.few(count, seed)
            for way in WAYS:
                found[str(count)][way].append(run_way(way, config.source, few, config.steps, seed))
            LOG.info("%d labels, seed %d: %s", count, seed, {way: found[str(count)][way][-1] for way in WAYS})
    return found


def train(config: TrainTypesConfig) -> dict[str, Any]:
    """Studies, or trains the head that ships; writes what the configuration says."""
    if config.quick:
        config = dataclasses.replace(config, steps=5, seeds=1)
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    tokenizer = WordPieceTokenizer.from_json((config.source / VOCABULARY).read_text(encoding="utf-8"))
    task = load_task(tokenizer, load_pretrained(config.source).config.context)
    config.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    measures = compare(config, task) if config.study else train_head(config, task)
    result: dict[str, Any] = {
        "command": config.command,
        "seed": config.seed,
        **measures,
        "majority": float(torch.bincount(task.test[1]).max() / len(task.test[1])),
        "wall_seconds": round(time.monotonic() - started, 1),
    }
    name = "study.json" if config.study else "result.json"
    write_atomically(config.folder / name, json.dumps(result, indent=2) + "\n")
    if config.study:
        draw_transfer(result, config.folder / "transfer.png")
    return result


def train_head(config: TrainTypesConfig, task: Task) -> dict[str, Any]:
    """Trains the head that ships on all labels, BERT staying as it is; writes `head.pt`."""
    seed_everything(config.seed)
    model = TypeClassifier(load_pretrained(config.source), frozen=True)
    fit(model, task.train, 2e-3, 10 * config.steps, config.seed)
    save_weights(config.folder / "head.pt", model.head)
    return {"head_accuracy": accuracy(model, task.test), "labels": len(task.train[1])}


def compare(config: TrainTypesConfig, task: Task) -> dict[str, Any]:
    """Test accuracies of each way, and by how many points pretraining is better than random weights, on the mean."""
    accuracies = study(config, task)
    gains = {count: 100 * float(np.mean(w["pretrained"]) - np.mean(w["random"])) for count, w in accuracies.items()}
    return {"accuracies": accuracies, "gain_points": gains}


def draw_transfer(result: dict[str, Any], path: Path) -> None:
    """Draws the accuracies by number of labels: the mean of each way as a line, its seeds as points."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    counts = [int(count) for count in result["accuracies"]]
    for number, way in enumerate(WAYS):
        values = [ways[way] for ways in result["accuracies"].values()]
        axis.plot(counts, [np.mean(one) for one in values], marker="o", color=f"C{number}", label=way)
        for count, one in zip(counts, values, strict=True):
            axis.scatter([count] * len(one), one, color=f"C{number}", alpha=0.4, s=14)
    axis.axhline(result["majority"], color="grey", linestyle="--", label="most frequent class")
    axis.set(xscale="log", xlabel="labels", ylabel="accuracy", title="Kind of a sentence: what pretraining is worth")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(config: TrainTypesConfig) -> None:
    """Trains and says what came out."""
    result = train(config)
    for count, ways in result.get("accuracies", {}).items():
        print(f"{count} labels: " + ", ".join(f"{way} {np.mean(values):.3f}" for way, values in ways.items()))
        print(f"pretraining gains {result['gain_points'][count]:.1f} points")
    if not config.study:
        print(f"the head that ships: {result['head_accuracy']:.3f}, guessing {result['majority']:.3f}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(TrainTypesConfig, description=__doc__))
