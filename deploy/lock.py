"""`make lock`: writes deploy/locks, what each serving image installs, every file by its SHA-256.

pip resolves pyproject.toml's dependencies within constraints.txt, once for each processor, without installing, and
reports the files that it would take. From whatever index it is set to: only names, versions and hashes are written.
Standard library only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "deploy" / "locks"
PYTHON = "3.11"
"""Of the base image."""
GLIBC = range(17, 37)
"""Minor versions of glibc 2 that bookworm's runs."""
PROCESSORS = ("x86_64", "aarch64")
HEADER = """\
# Made by `make lock` from pyproject.toml and constraints.txt; never edited. Python {python}, {processors}.
"""

Packages = dict[str, tuple[str, set[str]]]
"""Name -> version and hashes."""


def images() -> dict[str, list[str]]:
    """Lock's name -> extras of pyproject.toml, for every image that serves or that others run beside the services."""
    services = tomllib.loads((ROOT / "services" / "services.toml").read_text(encoding="utf-8"))["services"]
    serving = {f"{name}-{runtime}": [runtime, name] for name in services for runtime in ("cpu", "gpu")}
    return {**serving, "gateway": ["gateway"], "load": ["load"]}


def processors(name: str) -> tuple[str, ...]:
    """NVIDIA's libraries are for x86_64 here: its machines with other processors need other builds."""
    return PROCESSORS[:1] if name.endswith("-gpu") else PROCESSORS


def resolve(extras: list[str], processor: str) -> Packages:
    """What pip would install.

    Raises:
        SystemExit: it finds no solution; with pip's own words.
    """
    listing = [sys.executable, str(ROOT / "deploy" / "docker" / "requirements.py"), *extras]
    wanted = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "wanted.txt").write_text(wanted, encoding="utf-8")
        platforms = [f"manylinux_2_{minor}_{processor}" for minor in GLIBC] + [f"manylinux2014_{processor}"]
        command = [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--dry-run", "--ignore-installed", "--target", folder, "--report", f"{folder}/report.json"),
            *("--only-binary", ":all:", "--implementation", "cp", "--python-version", PYTHON),
            *("--abi", f"cp{PYTHON.replace('.', '')}", "--abi", "abi3", "--abi", "none"),
            *(part for platform in platforms for part in ("--platform", platform)),
            *("--constraint", str(ROOT / "constraints.txt"), "--requirement", f"{folder}/wanted.txt"),
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"lock: {' '.join(extras)} for {processor}: {done.stderr.strip()[-2000:]}")
        report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
    return {
        entry["metadata"]["name"].lower().replace("_", "-"): (
            entry["metadata"]["version"],
            {entry["download_info"]["archive_info"]["hashes"]["sha256"]},
        )
        for entry in report["install"]
    }


def merge(found: list[Packages]) -> Packages:
    """One version of each, with the hashes of all processors.

    Raises:
        SystemExit: the processors get different versions, so constraints.txt must say which.
    """
    merged: Packages = {}
    for packages in found:
        for name, (version, hashes) in packages.items():
            known, others = merged.setdefault(name, (version, set()))
            if known != version:
                raise SystemExit(f"lock: {name} is {known} for one processor and {version} for another; pin it")
            others |= hashes
    return merged


def text_of(packages: Packages, processors: tuple[str, ...]) -> str:
    """The lock as pip reads it."""
    lines = [HEADER.format(python=PYTHON, processors=" and ".join(processors))]
    for name, (version, hashes) in sorted(packages.items()):
        lines.append(
            " \\\n    ".join([f"{name}=={version}", *(f"--hash=sha256:{each}" for each in sorted(hashes))]) + "\n"
        )
    return "".join(lines)


def main() -> None:
    """Writes the locks that are named, or all; those of images that are no more go."""
    known = images()
    names = sys.argv[1:] or list(known)
    for name in names:
        if name not in known:
            raise SystemExit(f"lock: there is no image {name}; known: {', '.join(known)}")
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda processor, name=name: resolve(known[name], processor), processors(name)))
        packages = merge(found)
        path = LOCKS / f"{name}.lock"
        path.with_suffix(".new").write_text(text_of(packages, processors(name)), encoding="utf-8")
        path.with_suffix(".new").replace(path)
        print(f"{path.relative_to(ROOT)}: {len(packages)} packages")
    for path in LOCKS.glob("*.lock"):
        if path.stem not in known:
            path.unlink()


if __name__ == "__main__":
    main()
