"""What lies in the model roots: `<root>/<service>/<model>/{model.toml, <version>/...}`, found without opening a graph.

A scan tells folders that are gone from folders that cannot be looked into (a volume that was taken away, a permission,
a failing disk): what came from the latter stays in service.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shared.artifacts import CARD_NAME, MANIFEST_NAME
from shared.serving.model_config import CONFIG_NAME

PIPELINE_NAME = "pipeline.toml"
"""A version's folder with this file is a pipeline's; see shared/serving/pipelines."""
Stamp = tuple[tuple[str, int, int, int], ...]
"""Name, time of change (ns), inode and size of some files: it differs when one of them was replaced."""


@dataclass(frozen=True)
class FoundVersion:
    """A version's folder. `published` differs after another publication, `files` after any change in the folder."""

    folder: Path
    published: Stamp
    files: Stamp

    @property
    def is_pipeline(self) -> bool:
        """Whether it holds no model, but a pipeline."""
        return any(entry[0] == PIPELINE_NAME for entry in self.files)


@dataclass
class FoundModel:
    """A model's versions by number, and the `model.toml` that counts, if there is one, with its stamp."""

    versions: dict[int, FoundVersion] = field(default_factory=dict)
    config: Path | None = None
    config_stamp: Stamp = ()


@dataclass
class Scan:
    """Everything found, and the folders that could not be looked into with the cause."""

    models: dict[str, FoundModel] = field(default_factory=dict)
    pipelines: dict[str, FoundModel] = field(default_factory=dict)
    unreadable: dict[Path, str] = field(default_factory=dict)

    def cause_for(self, folder: Path) -> str:
        """Why `folder` could not be looked into; empty if it could, or is gone."""
        return next((cause for blind, cause in self.unreadable.items() if folder.is_relative_to(blind)), "")


def scan(roots: Iterable[Path], service: str) -> Scan:
    """Looks through all roots; for the same version or `model.toml` the first root wins."""
    found = Scan()
    for root in roots:
        for folder in _entries(root / service, found, required=True):
            if folder.name.startswith("."):
                continue
            for path in _entries(folder, found):
                if path.name == CONFIG_NAME:
                    model = found.models.setdefault(folder.name, FoundModel())
                    if model.config is None:
                        model.config, model.config_stamp = path, _stamp([path], found)
                elif (
                    path.name.isascii() and path.name.isdigit() and path.is_dir() and (version := _version(path, found))
                ):
                    kind = found.pipelines if version.is_pipeline else found.models
                    kind.setdefault(folder.name, FoundModel()).versions.setdefault(int(path.name), version)
    return found


def _version(folder: Path, found: Scan) -> FoundVersion | None:
    files = _stamp((path for path in _entries(folder, found) if path.name != CARD_NAME), found)
    if found.cause_for(folder):
        return None
    identity = tuple(entry for entry in files if entry[0] in (MANIFEST_NAME, PIPELINE_NAME))
    return FoundVersion(folder, identity or files, files)


def _stamp(paths: Iterable[Path], found: Scan) -> Stamp:
    stamps = []
    for path in paths:
        try:
            stat = path.stat()
        except FileNotFoundError:  # it vanished while we looked
            continue
        except OSError as error:
            found.unreadable[path.parent] = _cause(path, error)
            continue
        stamps.append((path.name, stat.st_mtime_ns, stat.st_ino, stat.st_size))
    return tuple(sorted(stamps))


def _entries(folder: Path, found: Scan, *, required: bool = False) -> Iterator[Path]:
    try:
        yield from sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError) as error:
        if required:
            found.unreadable[folder] = _cause(folder, error)
    except OSError as error:
        found.unreadable[folder] = _cause(folder, error)


def _cause(path: Path, error: OSError) -> str:
    return f"{path} cannot be read: {error.strerror}"
