"""Prints what an image has to install: the plain dependencies of pyproject.toml and those of the extras named.

`python requirements.py cpu vision`. The images read this text instead of pyproject.toml itself, so that an edit there
that changes no dependency leaves their layers in the cache. Standard library only: nothing is installed when it runs.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: str, extras: list[str]) -> list[str]:
    """The requirements, sorted, each once.

    Args:
        pyproject: text of pyproject.toml.
        extras: names of optional dependencies.

    Raises:
        SystemExit: an extra does not exist.
    """
    project = tomllib.loads(pyproject)["project"]
    optional: dict[str, list[str]] = project["optional-dependencies"]
    unknown = sorted(set(extras) - set(optional))
    if unknown:
        raise SystemExit(f"requirements: no extra {', '.join(unknown)}, expected some of {', '.join(sorted(optional))}")
    return sorted({*project["dependencies"], *(line for extra in extras for line in optional[extra])})


if __name__ == "__main__":
    print("\n".join(requirements(Path("pyproject.toml").read_text(encoding="utf-8"), sys.argv[1:])))
