"""Exports BERT and publishes it: `python -m services.nlp.training.export_bert --corpus english`.

One graph answers for gaps, vectors, next sentences and, if train_types has made its head, classes. int8 ships if its
loss on held-back gaps is at most 0.02 nats above that of `fp16`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
import tyro
from numpy.typing import NDArray

from services.nlp.serving.encoding import CLASSES, GAPS
from services.nlp.tokenizers.wordpiece import WordPieceTokenizer
from services.nlp.training.bert_data import CorpusName
from services.nlp.training.bert_graphs import (
    TypeHead,
    check_bert,
    export_bert,
    onnx_follows,
    onnx_measures,
)
from services.nlp.training.models.bert import Bert
from services.nlp.training.publishing import REFERENCE, asset, describe, publish_graphs, read_result, write_variants
from services.nlp.training.sentence_types import LABELS
from services.nlp.training.train_bert import VOCABULARY, HeldBack, held_back_parts
from services.nlp.training.train_types import Task, load_pretrained, load_task
from shared.artifacts import Manifest, TrainingRecord
from shared.data.catalog import DATASETS
from shared.training.export import open_session, opset_of, tensor_specs
from shared.training.latency import measure_latencies
from shared.training.machine import cpu_name

LOG = logging.getLogger("usagi.export")
MASKED_LANGUAGE_MODEL = "masked-language-model"
MAX_RISE = 0.02
LATENCY_PIECES = 16
DATA = {"english": ("enja", "shakespeare"), "soseki": ("soseki",)}


@dataclass(frozen=True)
class ExportBertConfig:
    """Exports a trained BERT to ONNX, compresses it, and publishes it with its manifest."""

    corpus: CorpusName = "english"
    """What the run read."""
    seed: int = 0
    """Seed of the run to ship."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    root: Path = Path("var/models")
    """Model root to publish into; `deploy/models` holds what the images are built with."""
    version: int = 1
    """Version number to publish as; the same version is replaced."""
    quick: bool = False
    """Export a `--quick` run; the card is not copied to `services/nlp/cards`."""

    @property
    def run_name(self) -> str:
        """Of the run's folder."""
        return f"seed{self.seed}" + ("-quick" if self.quick else "")

    @property
    def command(self) -> str:
        """The command line that exports this run again, without paths of the machine."""
        words = ["python -m services.nlp.training.export_bert", f"--corpus {self.corpus}", f"--seed {self.seed}"]
        words += [f"--version {self.version}"] if self.version != 1 else []
        return " ".join([*words, "--quick"] if self.quick else words)


@dataclass(frozen=True)
class TrainedBert:
    """What the runs made: BERT with its result and, where there is one, the head for classes with its own."""

    bert: Bert
    result: dict[str, Any]
    vocabulary: str
    head: TypeHead | None
    head_result: dict[str, Any]

    @classmethod
    def load(cls, config: ExportBertConfig) -> TrainedBert:
        """Reads both runs' folders; raises ConfigurationError if BERT's is not finished."""
        folder = config.runs / f"{config.corpus}-bert" / config.run_name
        bert = load_pretrained(folder).eval()
        heads = config.runs / f"{config.corpus}-bert-types" / config.run_name
        head = TypeHead(bert.config.width, len(LABELS)).eval() if (heads / "head.pt").exists() else None
        if head:
            head.load_state_dict(torch.load(heads / "head.pt", weights_only=True))
        vocabulary = (folder / VOCABULARY).read_text(encoding="utf-8")
        return cls(bert, read_result(folder), vocabulary, head, read_result(heads) if head else {})


def export(config: ExportBertConfig) -> Path:
    """Exports, measures, judges and publishes a run; returns the folder of the published version.

    Raises:
        ConfigurationError: the run is not finished, or the export differs from PyTorch.
    """
    torch.set_num_threads(1)
    trained = TrainedBert.load(config)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "bert.onnx"
        export_bert(trained.bert, trained.head, source)
        parity = check_bert(trained.bert, trained.head, source)
        paths = write_variants(source, Path(folder), "bert")
        manifest = _manifest(config, trained, paths, parity)
        assets = {VOCABULARY: trained.vocabulary.encode()}
        return publish_graphs(config.root, manifest, paths, assets, bundled=not config.quick)


def measure_graph(session: ort.InferenceSession, held: HeldBack, task: Task | None) -> dict[str, float]:
    """What a graph makes of the held-back texts: gaps in single sentences (in pairs where there are none), next
    sentences and, with a task, classes."""
    gaps = onnx_measures(session, [tuple(map(np.asarray, p)) for p in held.gaps(held.singles or held.pairs)])
    follows = onnx_follows(session, [tuple(map(np.asarray, p)) for p in held.follows()])
    measures = {**gaps, "next_accuracy": follows}
    if task is not None:
        tokens, labels = (part.numpy() for part in task.test)
        found = [_classes(session, tokens[at : at + 125]) for at in range(0, len(tokens), 125)]
        measures["class_accuracy"] = float((np.concatenate(found).argmax(-1) == labels).mean())
    return measures


def _classes(session: ort.InferenceSession, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    feeds = {"tokens": tokens, "segments": np.zeros_like(tokens), "positions": np.zeros((len(tokens), 1), np.int64)}
    return np.asarray(session.run([CLASSES], feeds)[0])


def _manifest(config: ExportBertConfig, trained: TrainedBert, paths: dict[str, Path], parity: float) -> Manifest:
    tokenizer = WordPieceTokenizer.from_json(trained.vocabulary)
    context = trained.bert.config.context
    held = held_back_parts(config.corpus, tokenizer, context, quick=config.quick)
    task = load_task(tokenizer, context) if trained.head else None
    sessions = {name: open_session(path) for name, path in paths.items()}
    measures = {name: measure_graph(session, held, task) for name, session in sessions.items()}
    latencies = measure_latencies(
        {name: _one_gap(session) for name, session in sessions.items()}, np.zeros((1, 1), np.float32)
    )
    LOG.info("held back: %s", measures)
    shipped = [name for name in paths if measures[name]["nats"] <= measures[REFERENCE]["nats"] + MAX_RISE]
    metrics = {
        name: {
            **measures[name],
            "latency_p50_ms": latencies[name].p50_ms,
            "latency_p95_ms": latencies[name].p95_ms,
            **({"parity_max_abs_diff": parity} if name == REFERENCE else {}),
        }
        for name in shipped
    }
    graph = onnx.load(str(paths[REFERENCE])).graph
    return Manifest(
        service="nlp",
        name=f"{config.corpus}-bert",
        version=config.version,
        task=MASKED_LANGUAGE_MODEL,
        description=_describe(trained),
        inputs=tensor_specs(graph.input),
        outputs=tensor_specs(graph.output),
        variants={name: describe(name, paths[name], metrics[name], latencies[name]) for name in shipped},
        preprocessing={"context": context, "words": "corpus", "corpus": config.corpus},
        labels=LABELS if task else (),
        opset=opset_of(paths[REFERENCE]),
        training=_record(config, trained),
        measure="nats",
        assets={VOCABULARY: asset(trained.vocabulary.encode())},
    )


def _describe(trained: TrainedBert) -> str:
    config = trained.bert.config
    kinds = f", says which of {len(LABELS)} kinds a sentence is" if trained.head else ""
    return (
        f"Fills gaps, gives vectors, says what follows{kinds}: BERT of {config.layers} layers of {config.width}, "
        f"{config.vocabulary} WordPieces, {config.context} of them in sight. Times are those of one run of "
        f"{LATENCY_PIECES} pieces with one gap."
    )


def _one_gap(session: ort.InferenceSession) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """One run of as many rows as the batch has, each with one gap."""

    def predict(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        rows = len(batch)
        feeds = {
            "tokens": np.full((rows, LATENCY_PIECES), 10, np.int64),
            "segments": np.zeros((rows, LATENCY_PIECES), np.int64),
            "positions": np.ones((rows, 1), np.int64),
        }
        return np.asarray(session.run([GAPS], feeds)[0])

    return predict


def _record(config: ExportBertConfig, trained: TrainedBert) -> TrainingRecord:
    datasets = [DATASETS[name] for name in DATA[config.corpus]]
    commands = [trained.result["command"], *([trained.head_result["command"]] if trained.head else []), config.command]
    guessing = trained.result["baselines"]
    return TrainingRecord(
        command=" && ".join(commands),
        seed=config.seed,
        data="; ".join(f"{dataset.description}; {dataset.source_url}" for dataset in datasets)
        + "; what is held back is said in services/nlp/training/bert_data.py",
        data_licence="; ".join(dataset.licence for dataset in datasets),
        device=cpu_name(),
        wall_seconds=trained.result["wall_seconds"] + trained.head_result.get("wall_seconds", 0),
        baselines={"uniform": guessing["uniform"], "unigram": guessing.get("unigram", guessing["pairs_unigram"])},
    )


def main(config: ExportBertConfig) -> None:
    """Publishes and says where."""
    print(f"published {export(config)}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(ExportBertConfig, description=__doc__))
