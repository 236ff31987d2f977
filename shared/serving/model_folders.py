"""What lies in the model roots: `<root>/<service>/<model>/{model.toml, <version>/...}`, found without opening a graph.

A plain ONNX file without a manifest may lie as `<model>.onnx`, `<model>/model.onnx` or `<model>/<version>/model.onnx`.
The first two have no number, so theirs is the time of their last change, such as 20261125153000 in UTC: every replica
finds the same, and a file that is replaced is a new version.

A scan tells folders that are gone from folders that cannot be looked into (a volume that was taken away, a permission,
a failing disk): what came from the latter stays in service.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from shared.artifacts import CARD_NAME, MANIFEST_NAME
from shared.serving.model_config import CONFIG_NAME

PIPELINE_NAME = "pipeline.toml"
"""A version's folder with this file is a pipeline's; see shared/serving/pipelines."""
GRAPH_NAME, GRAPH_SUFFIX = "model.onnx", ".onnx"
WEIGHTS_SUFFIXES = (".data", "_data")
"""How exporters go on after a graph's name for the file of its weights, at least: `linear.onnx_data_1`."""
Stamp = tuple[tuple[str, int, int, int], ...]
"""Name, time of change (ns), inode and size of some files: it differs when one of them was replaced."""


@dataclass(frozen=True)
class FoundVersion:
    """A version's folder. `published` differs after another publication, `files` after any change in the folder.

    `graph` is the file of a version without a manifest, which is not `settled` while it may still be copied.
    """

    folder: Path
    published: Stamp
    files: Stamp
    graph: Path | None = None
    settled: bool = True

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
    """Looks through all roots; for the same version, `model.toml` or file without a number the first root wins."""
    found = Scan()
    unnumbered: set[str] = set()
    for root in roots:
        entries = _visible(_entries(root / service, found, required=True))
        for path in entries:
            if path.suffix == GRAPH_SUFFIX and _is(Path.is_file, path, found):
                weights = tuple(path.name + suffix for suffix in WEIGHTS_SUFFIXES)
                files = [other for other in entries if other == path or other.name.startswith(weights)]
                _add_unnumbered(path, path.stem, files, unnumbered, found)
        for folder in entries:
            _scan_model(folder, unnumbered, found)
    return found


def _scan_model(folder: Path, unnumbered: set[str], found: Scan) -> None:
    entries = list(_entries(folder, found))
    for path in entries:
        if path.name == CONFIG_NAME:
            model = found.models.setdefault(folder.name, FoundModel())
            if model.config is None:
                model.config, model.config_stamp = path, _stamp([path], found)
        elif path.name == GRAPH_NAME:
            beside = [other for other in _visible(entries) if other.name not in (CONFIG_NAME, CARD_NAME)]
            files = [other for other in beside if _is(Path.is_file, other, found)]
            _add_unnumbered(path, folder.name, files, unnumbered, found)
        elif (
            path.name.isascii()
            and path.name.isdigit()
            and _is(Path.is_dir, path, found)
            and (version := _version(path, found))
        ):
            kind = found.pipelines if version.is_pipeline else found.models
            kind.setdefault(folder.name, FoundModel()).versions.setdefault(int(path.name), version)


def _add_unnumbered(graph: Path, name: str, files: list[Path], unnumbered: set[str], found: Scan) -> None:
    stamp = _stamp(files, found)
    if name in unnumbered or not any(entry[0] == graph.name for entry in stamp):
        return
    unnumbered.add(name)
    changed = datetime.fromtimestamp(max(entry[1] for entry in stamp) // 1_000_000_000, UTC)
    version = FoundVersion(graph.parent, stamp, stamp, graph)
    found.models.setdefault(name, FoundModel()).versions.setdefault(int(f"{changed:%Y%m%d%H%M%S}"), version)


def _version(folder: Path, found: Scan) -> FoundVersion | None:
    paths = _visible(_entries(folder, found))
    files = _stamp((path for path in paths if path.name != CARD_NAME), found)
    if found.cause_for(folder):
        return None
    identity = tuple(entry for entry in files if entry[0] in (MANIFEST_NAME, PIPELINE_NAME))
    # a card without a manifest is half of a published version
    plain = not identity and folder / GRAPH_NAME in paths and folder / CARD_NAME not in paths
    return FoundVersion(folder, identity or files, files, folder / GRAPH_NAME if plain else None)


def _visible(paths: Iterable[Path]) -> list[Path]:
    """Without those that begin with a dot, under which many programs copy."""
    return [path for path in paths if not path.name.startswith(".")]


def _is(kind: Callable[[Path], bool], path: Path, found: Scan) -> bool:
    """Whether a path is of a kind; one that cannot be looked at is none, and its folder unreadable."""
    try:
        return kind(path)
    except OSError as error:
        found.unreadable[path.parent] = _cause(path, error)
        return False


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
