"""What the exports of this service share: a graph's compressed variants, and publishing one model with its card."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.artifacts import CARD_NAME, Asset, Manifest, Variant, publish, sha256_of, write_atomically
from shared.errors import ConfigurationError
from shared.training.card import render_card
from shared.training.compact import quantize_matrices, store_half
from shared.training.latency import Latency

CARDS = Path(__file__).parents[1] / "cards"
VARIANTS = {"fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}
TRAIN_GPT = "python -m services.nlp.training.train_gpt"
REFERENCE = "fp16"
"""The variant that int8 is compared with: float32 sums over weights stored as float16."""


def read_result(folder: Path) -> dict[str, Any]:
    """The `result.json` of a run.

    Raises:
        ConfigurationError: the run is missing or not finished.
    """
    path = folder / "result.json"
    if not path.exists():
        raise ConfigurationError(f"{path} does not exist; train first: make train DOMAIN=nlp, or {TRAIN_GPT}")
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def write_variants(source: Path, folder: Path, prefix: str) -> dict[str, Path]:
    """Compresses a float32 graph; returns the files by variant."""
    paths = {name: folder / f"{prefix}.{file}" for name, file in VARIANTS.items()}
    store_half(source, paths["fp16"])
    quantised = folder / f"{prefix}.quantised.onnx"
    quantize_matrices(source, quantised, embeddings=True)
    store_half(quantised, paths["int8"])  # what is left in float
    return paths


def describe(name: str, path: Path, metrics: Mapping[str, float], latency: Latency) -> Variant:
    """A variant's entry in the manifest; `latency` is that of one run of the graph."""
    measured = {
        **metrics,
        "run_p50_ms": round(latency.p50_ms, 3),
        "runs_per_second": round(latency.throughput[latency.max_batch], 2),
    }
    return Variant(
        file=VARIANTS[name],
        sha256=sha256_of(path),
        bytes=path.stat().st_size,
        metrics={key: round(value, 6) for key, value in measured.items()},
        max_batch=latency.max_batch,
    )


def asset(content: bytes) -> Asset:
    """An asset's entry in the manifest."""
    return Asset(hashlib.sha256(content).hexdigest(), len(content))


def publish_graphs(
    root: Path, manifest: Manifest, paths: Mapping[str, Path], assets: Mapping[str, bytes], *, bundled: bool
) -> Path:
    """Publishes one model; returns the folder of the version.

    Args:
        root: a model root.
        manifest: its description.
        paths: the graphs by variant.
        assets: contents of its assets.
        bundled: whether it ships, so that its card is copied to this service's cards.
    """
    card = render_card(manifest)

    def fill(target: Path) -> None:
        for name in manifest.variants:
            shutil.copy(paths[name], target / VARIANTS[name])
        for name, content in assets.items():
            (target / name).write_bytes(content)
        (target / CARD_NAME).write_text(card, encoding="utf-8")

    published = publish(root, manifest, fill)
    if bundled and root.resolve() == Path("deploy/models").resolve():
        write_atomically(CARDS / f"{manifest.name}.md", card)
    return published
