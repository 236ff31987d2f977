"""The READMEs' tables come from the manifests, and say so when they do not."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from shared.training.readme import newest_manifests, render_table, with_table
from shared.training.reproduce import compare

ROOT = Path(__file__).parents[2]


def test_tables_are_true():
    done = subprocess.run(
        [sys.executable, "-m", "shared.training.readme", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + "; run `python -m shared.training.readme`"


def test_every_variant_has_a_row():
    manifests = newest_manifests(ROOT / "deploy/models")
    rows = render_table(manifests).splitlines()[2:]
    assert len(rows) == sum(len(manifest.variants) for manifest in manifests)


def test_only_what_stands_between_the_markers_changes():
    text = "before\n<!-- models:begin -->\nold\n<!-- models:end -->\nafter\n"
    made = with_table(text, "new")
    assert made == "before\n<!-- models:begin -->\nnew\n<!-- models:end -->\nafter\n"
    with pytest.raises(ValueError, match="lacks"):
        with_table("no markers", "new")


def test_reproduce_says_which_models_there_are():
    done = subprocess.run(
        [sys.executable, "-m", "shared.training.reproduce", "nope"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "flowers-efficientnet-lite0" in done.stderr.split("known: ")[1]


@pytest.mark.parametrize(("accuracy", "within"), [(0.95, True), (0.90, False)])
def test_reproduced_accuracy_is_held_against_the_spread(accuracy, within):
    shipped = newest_manifests(ROOT / "deploy/models", "vision")[0]
    variant = shipped.variants["fp32"]
    made = dataclasses.replace(variant, metrics={**variant.metrics, "accuracy": accuracy})
    assert compare(shipped, dataclasses.replace(shipped, variants={"fp32": made})) is within
