"""Checks every published vision model against its manifest: `python -m services.vision.training.evaluate`.

Each variant's file must have the SHA-256 of the manifest, its card must be the manifest's, and its accuracy, measured
again on the held-back photos through the same preprocessing, may differ by one photo: another CPU may round an int8 tie
the other way. Ends with status 1 if anything differs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from services.vision.preprocess import ClassificationPreprocessing
from services.vision.training.data import Photos
from services.vision.training.tasks import task_of_labels
from shared.artifacts import MANIFEST_NAME, ArtifactError, Manifest, read_manifest, verify_variant
from shared.errors import ConfigurationError
from shared.training.card import card_problem
from shared.training.export import onnx_predictor, open_session
from shared.training.metrics import Classification, classify

MAX_DIFFERENCE = 1
"""Photos by which a count may differ from the manifest's."""
CARDS = Path(__file__).parents[1] / "cards"


@dataclass(frozen=True)
class EvaluateConfig:
    """Measures every published vision model again and compares with its manifest."""

    root: Path = Path("deploy/models")
    """Model root to check."""
    confusion: bool = False
    """Also print which class is taken for which."""


@dataclass(frozen=True)
class Check:
    """One variant checked: `problem` is empty if all is well."""

    model: str
    variant: str
    claimed: float
    result: Classification | None
    problem: str


def check_version(folder: Path, photos: Photos) -> list[Check]:
    """Checks one model version.

    Raises:
        ArtifactError: its manifest cannot be read.
    """
    manifest = read_manifest(folder)
    card = card_problem(folder, manifest, CARDS)
    return [_check_variant(folder, manifest, name, photos, card) for name in manifest.variants]


def _check_variant(folder: Path, manifest: Manifest, name: str, photos: Photos, card: str) -> Check:
    variant = manifest.variants[name]
    claimed = variant.metrics["accuracy"]
    try:
        path = verify_variant(folder, variant)
    except ArtifactError as error:
        return Check(manifest.name, name, claimed, None, error.message)
    config = ClassificationPreprocessing.from_dict(manifest.preprocessing)
    result = classify(onnx_predictor(open_session(path)), photos.tensors(config), photos.labels)
    difference = abs(result.correct - round(claimed * len(photos)))
    wrong = f"{result.correct} right, the manifest says {round(claimed * len(photos))}"
    return Check(manifest.name, name, claimed, result, wrong if difference > MAX_DIFFERENCE else card)


def check_root(root: Path) -> list[Check]:
    """Checks every version of every vision model under a root.

    Raises:
        ConfigurationError: there is none, or one has labels that no task here has.
    """
    folders = sorted(path.parent for path in root.glob(f"vision/*/*/{MANIFEST_NAME}"))
    if not folders:
        raise ConfigurationError(f"{root} holds no vision model; export one: python -m services.vision.training.export")
    tasks = {folder: task_of_labels(read_manifest(folder).labels) for folder in folders}
    parts = {name: task.load("test") for name, task in {t.name: t for t in tasks.values()}.items()}
    return [check for folder, task in tasks.items() for check in check_version(folder, parts[task.name])]


def _print(checks: list[Check], config: EvaluateConfig) -> None:
    table = Table("model", "variant", "manifest", "now", "photos", "verdict")
    for check in checks:
        now = f"{check.result.accuracy:.4f}" if check.result else ""
        count = str(len(check.result.labels)) if check.result else ""
        table.add_row(check.model, check.variant, f"{check.claimed:.4f}", now, count, check.problem or "agrees")
    Console().print(table)
    for check in checks:
        if config.confusion and check.result is not None:
            print(f"{check.model} {check.variant}: rows are labels, columns answers")
            print(check.result.confusion())


def main(config: EvaluateConfig) -> int:
    """Prints a table; returns the process's exit status."""
    checks = check_root(config.root)
    _print(checks, config)
    return 1 if any(check.problem for check in checks) else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(EvaluateConfig, description=__doc__)))
