"""Exports a trained translator and publishes it: `python -m services.nlp.training.export --seed 0`.

A translator is two models: the encoder, which bears its name and its vocabularies, and `-step`, one step of the
decoder. Each has a variant `fp16` (float32 sums over weights stored as float16) and `int8` (int8 weights and
embeddings). BLEU on the corpus' dev file, with the search that serving uses, decides whether int8 ships: it may lose
0.5.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
import tyro

from services.nlp.serving.predictors import (
    DEFAULT_BEAM,
    DEFAULT_PENALTY,
    PENALTY,
    STEP_SUFFIX,
    TRANSLATION,
    VOCABULARIES,
)
from services.nlp.serving.search import SearchSettings
from services.nlp.tokenizers.vocabularies import Vocabularies
from services.nlp.training.bleu import corpus_bleu
from services.nlp.training.candidates import Candidate, measure_variants
from services.nlp.training.data import load_pairs
from services.nlp.training.networks import Architecture, Network, load_network
from services.nlp.training.publishing import (
    REFERENCE,
    VARIANTS,
    asset,
    describe,
    publish_graphs,
    read_result,
    write_variants,
)
from services.nlp.training.translator_graphs import check_graphs, graphs_of
from shared.artifacts import Manifest, TrainingRecord, Variant
from shared.data.catalog import DATASETS
from shared.errors import ConfigurationError
from shared.training.export import opset_of, tensor_specs
from shared.training.machine import cpu_name, spread

LOG = logging.getLogger("usagi.export")
MAX_BLEU_LOSS = 0.5


@dataclass(frozen=True)
class ExportConfig:
    """Exports a trained translator to ONNX, compresses it, and publishes it with manifests."""

    seed: int = 0
    """Seed of the run to ship."""
    name: str = "enja-transformer"
    """Of the run, and of the model."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    root: Path = Path("var/models")
    """Model root to publish into; `deploy/models` holds what the images are built with."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Variants to publish, of those that the gate lets pass; the others are measured and named in the card."""
    length_penalty: float = DEFAULT_PENALTY
    """Of searches that ask for none; the best on held-back pairs."""
    version: int = 1
    """Version number to publish as; the same version is replaced."""
    quick: bool = False
    """Export a `--quick` run; cards are not copied to `services/nlp/cards`."""

    @property
    def run_folder(self) -> Path:
        """Where the run to ship lives."""
        return self.runs / self.name / (f"seed{self.seed}" + ("-quick" if self.quick else ""))

    @property
    def command(self) -> str:
        """The command line that exports this run again, without paths of the machine."""
        words = ["python -m services.nlp.training.export", f"--seed {self.seed}"]
        words += [f"--name {self.name}"] if self.name != ExportConfig.name else []
        words += [f"--variants {' '.join(self.variants)}"] if self.variants != ExportConfig.variants else []
        words += [f"--length-penalty {self.length_penalty:g}"] if self.length_penalty != DEFAULT_PENALTY else []
        words += [f"--version {self.version}"] if self.version != 1 else []
        return " ".join([*words, "--quick"] if self.quick else words)


def export(config: ExportConfig) -> list[Path]:
    """Exports, measures, judges and publishes a run; returns the folders of the published versions.

    Raises:
        ConfigurationError: the run is not finished, or the export differs from PyTorch.
    """
    result = read_result(config.run_folder)
    torch.set_num_threads(1)
    vocabularies = Vocabularies.from_json((config.run_folder / VOCABULARIES).read_text(encoding="utf-8"))
    model = load_network(config.run_folder, result)
    with tempfile.TemporaryDirectory() as folder:
        parity = write_graphs(model, Path(folder))
        LOG.info("largest difference from PyTorch %.1e", parity)
        served = SearchSettings(DEFAULT_BEAM, length_penalty=config.length_penalty)
        candidates = measure_variants(Path(folder), vocabularies, served)
        LOG.info("BLEU: %s", {name: candidate.quality["bleu"] for name, candidate in candidates.items()})
        shipped = choose(candidates, config.variants)
        architecture = result.get("architecture", "transformer")
        record = training_record(
            config, result, {n: c.quality["bleu"] for n, c in candidates.items() if n not in shipped}
        )
        # the step first: serving looks for it as soon as there is an encoder
        return [
            _publish(config, part, shipped, record, parity, vocabularies if part == "encoder" else None, architecture)
            for part in ("step", "encoder")
        ]


def write_graphs(model: Network, folder: Path) -> float:
    """Writes both graphs in float32 and in every variant; returns the largest difference between float32 and PyTorch.

    Raises:
        ConfigurationError: it is above PARITY_TOLERANCE.
    """
    graphs = graphs_of(model)
    graphs.export_encoder(folder / "encoder.onnx")
    graphs.export_step(folder / "step.onnx")
    parity = check_graphs(model, folder / "encoder.onnx", folder / "step.onnx")
    for part in ("encoder", "step"):
        write_variants(folder / f"{part}.onnx", folder, part)
    return parity


def ships(candidate: Candidate, reference: Candidate) -> bool:
    """Whether a variant earns its place: no more than MAX_BLEU_LOSS lost, and smaller or faster."""
    lost = reference.quality["bleu"] - candidate.quality["bleu"]
    smaller = candidate.step.stat().st_size < reference.step.stat().st_size
    return candidate is reference or (
        lost <= MAX_BLEU_LOSS and (smaller or candidate.whole_ms[0] < reference.whole_ms[0])
    )


def choose(candidates: dict[str, Candidate], wanted: tuple[str, ...]) -> dict[str, Candidate]:
    """Those of the wanted variants that pass.

    Raises:
        ConfigurationError: none does.
    """
    passing = {name: candidate for name, candidate in candidates.items() if ships(candidate, candidates[REFERENCE])}
    chosen = {name: candidate for name, candidate in passing.items() if name in wanted}
    if not chosen:
        raise ConfigurationError(f"none of the variants {', '.join(wanted)} may ship; these may: {', '.join(passing)}")
    return chosen


def training_record(
    config: ExportConfig, result: dict[str, Any], left_out: Mapping[str, float] | None = None
) -> TrainingRecord:
    """How the run came to be, with the other seeds beside it as spread, and the BLEU of variants that do not ship."""
    dataset = DATASETS["enja"]
    runs = [read_result(path.parent) for path in sorted(config.run_folder.parent.glob("seed*/result.json"))]
    same = [run for run in runs if _recipe(run) == _recipe(result)]
    return TrainingRecord(
        command=f"{result['command']} && {config.command}",
        seed=config.seed,
        data=f"{dataset.description}; {dataset.source_url}; the train file alone, {_division(result)}; BLEU is of the "
        "dev file",
        data_licence=dataset.licence,
        device=cpu_name(),
        wall_seconds=result["wall_seconds"],
        baselines={"source_copied": copied_bleu(), **(left_out or {})},
        spread={"bleu_greedy": spread([run["dev_greedy_bleu"] for run in same])} if len(same) > 1 else {},
    )


def _division(result: dict[str, Any]) -> str:
    if "--division report" not in result["command"]:
        return "500 pairs held back to choose the epoch"
    return "40,000 of its 50,000 pairs as the report divides them"


def _recipe(run: dict[str, Any]) -> str:
    return " ".join(str(run["command"]).replace(f"--seed {run['seed']}", "").split())


def copied_bleu() -> float:
    """BLEU of answering with the sentence itself: the floor."""
    dev = load_pairs("dev")
    return corpus_bleu(dev.english, dev.japanese).score


def _publish(
    config: ExportConfig,
    part: str,
    shipped: dict[str, Candidate],
    record: TrainingRecord,
    parity: float,
    vocabularies: Vocabularies | None,
    architecture: Architecture,
) -> Path:
    paths = {name: candidate.encoder if part == "encoder" else candidate.step for name, candidate in shipped.items()}
    first = next(iter(paths))
    graph = onnx.load(str(paths[first]), load_external_data=False).graph
    assets = {VOCABULARIES: vocabularies.to_json().encode()} if vocabularies else {}
    manifest = Manifest(
        service="nlp",
        name=config.name + ("" if part == "encoder" else STEP_SUFFIX),
        version=config.version,
        task=TRANSLATION if part == "encoder" else f"{TRANSLATION}{STEP_SUFFIX}",
        description=describe_part(part, architecture),
        inputs=tensor_specs(graph.input),
        outputs=tensor_specs(graph.output),
        variants={
            name: _variant(part, name, paths[name], candidate, parity if name == first else None)
            for name, candidate in shipped.items()
        },
        opset=opset_of(paths[first]),
        training=record,
        measure="bleu",
        preprocessing={PENALTY: config.length_penalty} if config.length_penalty != DEFAULT_PENALTY else {},
        assets={name: asset(content) for name, content in assets.items()},
    )
    return publish_graphs(config.root, manifest, paths, assets, bundled=not config.quick)


NETWORKS: dict[Architecture, str] = {
    "transformer": "a Transformer",
    "gru": "two GRUs without attention, the course report's",
    "gru-attention": "two GRUs with additive attention",
    "gru-dot": "two GRUs with attention by dot products",
}
_DESCRIPTIONS = {
    "encoder": "Translates an English sentence into Japanese: {network}. This graph reads the sentence; its decoder is "
    "the model of this name with `-step` behind. Times are those of a whole translation.",
    "step": "One step of a translator's decoder ({network}), its {memory} outside. BLEU is that of both graphs "
    "together; times are those of one step of one row.",
}


def describe_part(part: str, architecture: Architecture) -> str:
    """What the manifest of one of a translator's two models says of it."""
    memory = "cache" if architecture == "transformer" else "state"
    return _DESCRIPTIONS[part].format(network=NETWORKS[architecture], memory=memory)


def _variant(part: str, name: str, path: Path, candidate: Candidate, parity: float | None) -> Variant:
    latency = candidate.encoder_latency if part == "encoder" else candidate.step_latency
    p50, p95 = candidate.whole_ms if part == "encoder" else (latency.p50_ms, latency.p95_ms)
    metrics = {**candidate.quality, "latency_p50_ms": round(p50, 3), "latency_p95_ms": round(p95, 3)}
    if parity is not None:
        metrics["parity_max_abs_diff"] = parity
    return describe(name, path, metrics, latency)


def main(config: ExportConfig) -> None:
    """Publishes and says where."""
    for folder in export(config):
        print(f"published {folder}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(ExportConfig, description=__doc__))
