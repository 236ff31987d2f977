"""Makes a shipped model again by the very command in its manifest, and compares: `make reproduce MODEL=<name>`.

The command runs in `out/reproduce/<model>`, so it neither finds an earlier run's checkpoints nor touches the local
model root. If it was interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from shared.artifacts import Manifest
from shared.errors import ConfigurationError
from shared.measures import measure_named
from shared.training.readme import newest_manifests

BUNDLED = Path("deploy/models")
WORKPLACE = Path("out/reproduce")


def find(root: Path, name: str) -> Manifest:
    """The newest version of a model under a root, whatever its service.

    Raises:
        ConfigurationError: there is none; the message lists those that are.
    """
    manifests = newest_manifests(root)
    for manifest in manifests:
        if manifest.name == name:
            return manifest
    known = ", ".join(manifest.name for manifest in manifests) or "none"
    raise ConfigurationError(f"no model `{name}` under {root}; known: {known}")


def compare(shipped: Manifest, made: Manifest) -> bool:
    """Prints the measure of every variant, old and new; whether the first new one is not worse than the shipped spread.

    The measure's margin, or one example of the test part, is left, since two machines may round differently.
    """
    measure = measure_named(shipped.measure)
    for name in sorted(set(shipped.variants) & set(made.variants)):
        old, new = (manifest.variants[name].metrics[measure.name] for manifest in (shipped, made))
        print(f"{name:8} shipped {measure.text(old)}  made again {measure.text(new)}")
    first = next(iter(shipped.variants))
    metrics = made.variants[first].metrics
    spread = shipped.training.spread.get(measure.name, {}) if shipped.training else {}
    worst = spread.get("min" if measure.higher_is_better else "max", shipped.variants[first].metrics[measure.name])
    margin = measure.margin or 1 / metrics["test_photos"]
    print(
        f"within the spread: {measure.text(metrics[measure.name])} against {measure.text(worst)}, margin {margin:.4g}"
    )
    return measure.loss(worst, metrics[measure.name]) <= margin + 1e-9


def main() -> None:
    """Runs the manifest's command with this interpreter and exits with 1 if the result falls below the spread."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="name of a shipped model, such as flowers-efficientnet-lite0")
    options = parser.parse_args()
    try:
        shipped = find(BUNDLED, options.model)
    except ConfigurationError as error:
        sys.exit(f"reproduce: {error.message}")
    if shipped.training is None:
        sys.exit(f"reproduce: the manifest of {options.model} names no command")
    print(f"{shipped.training.command}\n(it took {shipped.training.wall_seconds / 60:.0f} min to make what is shipped)")
    folder = WORKPLACE / options.model
    if (folder / "var").exists():  # a finished reproduction: begin anew
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["sh", "-c", shipped.training.command], cwd=folder, env=_environment(), check=False)
    if done.returncode:
        sys.exit(done.returncode)
    sys.exit(0 if compare(shipped, find(folder / "var" / "models", options.model)) else 1)


def _environment() -> dict[str, str]:
    """This environment with this interpreter first, and no relative path that another folder would change."""
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    if environment.get("USAGI_DATA"):
        environment["USAGI_DATA"] = str(Path(environment["USAGI_DATA"]).resolve())
    return environment


if __name__ == "__main__":
    main()
