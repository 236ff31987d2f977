"""Checks every published nlp model against its manifest: `python -m services.nlp.training.evaluate`.

Each file must have the SHA-256 of the manifest, each card must be the manifest's, and a translator's BLEU on the
corpus' dev file, translated again by the exported graphs as serving would, may differ by 0.1. Ends with status 1 if
anything differs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from services.nlp.serving.generator import GENERATION, VOCABULARY
from services.nlp.serving.predictors import DEFAULT_BEAM, STEP_SUFFIX, TRANSLATION, VOCABULARIES, own_penalty
from services.nlp.serving.search import SearchSettings
from services.nlp.tokenizers.texts import read_text_tokenizer
from services.nlp.tokenizers.vocabularies import Vocabularies
from services.nlp.tokenizers.wordpiece import WordPieceTokenizer
from services.nlp.training.data import load_pairs
from services.nlp.training.export_bert import MASKED_LANGUAGE_MODEL, measure_graph
from services.nlp.training.export_minilm import TASK as SENTENCE_EMBEDDING
from services.nlp.training.export_minilm import measure_published
from services.nlp.training.offline import OnnxTranslator, onnx_held_out_loss, onnx_predictor
from services.nlp.training.publishing import CARDS
from services.nlp.training.tasks import TASKS
from services.nlp.training.texts import held_back_text
from services.nlp.training.train_bert import held_back_parts
from shared.artifacts import (
    MANIFEST_NAME,
    ArtifactError,
    Manifest,
    read_assets,
    read_manifest,
    verify_variant,
)
from shared.errors import ConfigurationError
from shared.measures import measure_named
from shared.training.card import card_problem
from shared.training.export import open_session


@dataclass(frozen=True)
class EvaluateConfig:
    """Measures every published nlp model again and compares with its manifest."""

    root: Path = Path("deploy/models")
    """Model root to check."""


@dataclass(frozen=True)
class Check:
    """One variant checked: `problem` is empty if all is well."""

    model: str
    variant: str
    claimed: str
    found: str
    problem: str


def check_version(folder: Path) -> list[Check]:
    """Checks one model version.

    Raises:
        ArtifactError: its manifest cannot be read.
    """
    manifest = read_manifest(folder)
    return [_check_variant(folder, manifest, name) for name in manifest.variants]


def _check_variant(folder: Path, manifest: Manifest, name: str) -> Check:
    measure, variant = measure_named(manifest.measure), manifest.variants[name]
    claimed = variant.metrics[measure.name]
    try:
        verify_variant(folder, variant)
        value = _MEASUREMENTS[manifest.task](folder, manifest, name)
    except ArtifactError as error:
        return Check(manifest.name, name, measure.text(claimed), "", error.message)
    wrong = f"{measure.text(value)}, the manifest says {measure.text(claimed)}"
    problem = wrong if abs(value - claimed) > measure.margin else card_problem(folder, manifest, CARDS)
    return Check(manifest.name, name, measure.text(claimed), measure.text(value), problem)


def _bleu(folder: Path, manifest: Manifest, name: str) -> float:
    """BLEU of a variant of a translator, its decoder's variant of the same name included."""
    step_folder = folder.parents[1] / (manifest.name + STEP_SUFFIX) / str(manifest.version)
    step = read_manifest(step_folder)
    vocabularies = Vocabularies.from_json(read_assets(folder, manifest)[VOCABULARIES].decode())
    if name not in step.variants:
        raise ArtifactError(f"{step_folder} has no variant {name}, which its encoder has; publish both again")
    paths = verify_variant(folder, manifest.variants[name]), verify_variant(step_folder, step.variants[name])
    served = SearchSettings(beam=DEFAULT_BEAM, length_penalty=own_penalty(manifest))
    return OnnxTranslator.open(*paths, vocabularies).bleu(load_pairs("dev"), served)


def _encoders_claim(folder: Path, manifest: Manifest, name: str) -> float:
    """BLEU that a step's translator claims, which is measured where that is checked."""
    encoder = read_manifest(folder.parents[1] / manifest.name.removesuffix(STEP_SUFFIX) / str(manifest.version))
    return encoder.variants[name].metrics[manifest.measure]


def _language(folder: Path, manifest: Manifest, name: str) -> float:
    """Of a task its measure on what is held back; else nats a character on the held-back part of the text."""
    if "task" in manifest.preprocessing:
        session = open_session(verify_variant(folder, manifest.variants[name]))
        return TASKS[manifest.preprocessing["task"]]().evaluate(onnx_predictor(session))[manifest.measure]
    tokenizer = read_text_tokenizer(read_assets(folder, manifest)[VOCABULARY].decode())
    held = held_back_text(str(manifest.preprocessing["text"]))
    session = open_session(verify_variant(folder, manifest.variants[name]))
    return onnx_held_out_loss(session, tokenizer, held, int(manifest.preprocessing["context"]))


def _gaps(folder: Path, manifest: Manifest, name: str) -> float:
    """Nats a gap of a variant of a masked language model, on the gaps of the texts that it never saw."""
    tokenizer = WordPieceTokenizer.from_json(read_assets(folder, manifest)[VOCABULARY].decode())
    corpus, context = manifest.preprocessing["corpus"], int(manifest.preprocessing["context"])
    held = held_back_parts(corpus, tokenizer, context, quick=False)
    session = open_session(verify_variant(folder, manifest.variants[name]))
    return measure_graph(session, held, None)["nats"]


_MEASUREMENTS = {
    TRANSLATION: _bleu,
    TRANSLATION + STEP_SUFFIX: _encoders_claim,
    MASKED_LANGUAGE_MODEL: _gaps,
    SENTENCE_EMBEDDING: measure_published,
    GENERATION: _language,
}


def evaluate(config: EvaluateConfig, console: Console) -> bool:
    """Checks everything under the root, prints a table, and says whether all is well."""
    folders = sorted(path.parent for path in config.root.glob(f"nlp/*/*/{MANIFEST_NAME}"))
    if not folders:
        raise ConfigurationError(f"no nlp models under {config.root}; publish one: make export DOMAIN=nlp")
    table = Table("model", "variant", "manifest", "measured", "verdict")
    checks = [check for folder in folders for check in check_version(folder)]
    for check in checks:
        verdict = f"[red]{check.problem}[/red]" if check.problem else "[green]as claimed[/green]"
        table.add_row(check.model, check.variant, check.claimed, check.found, verdict)
    console.print(table)
    return not any(check.problem for check in checks)


def main(config: EvaluateConfig) -> None:
    """Checks and ends with status 1 if anything differs."""
    try:
        sys.exit(0 if evaluate(config, Console()) else 1)
    except (ConfigurationError, ArtifactError) as error:
        sys.exit(f"evaluate: {error.message}")


if __name__ == "__main__":
    main(tyro.cli(EvaluateConfig, description=__doc__))
