"""Finds a data set's file: in `USAGI_DATA`, in the cache, or at its official home.

1. `$USAGI_DATA/<file>`: a folder that somebody filled; the SHA-256 of its file is checked
2. `$USAGI_CACHE/<file>`, by default `~/.cache/usagi`: what an earlier call downloaded
3. the official source: downloaded with a progress bar, its SHA-256 checked, converted, put into the cache whole or not
   at all
"""

from __future__ import annotations

import os
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from shared.artifacts import sha256_of
from shared.data.catalog import DATASETS, Dataset
from shared.errors import ConfigurationError

BLOCK = 1 << 20
TIMEOUT_SECONDS = 60.0


def locate(name: str, *, download: bool = True) -> Path:
    """Path of a data set's file, fetched if need be.

    Args:
        name: as in `shared.data.catalog.DATASETS`.
        download: whether the network may be used.

    Raises:
        ConfigurationError: no such data set, it is not there and may not or cannot be fetched, or its file is damaged.
    """
    if name not in DATASETS:
        raise ConfigurationError(f"data set `{name}` is unknown; known: {', '.join(sorted(DATASETS))}")
    dataset = DATASETS[name]
    mirror = os.environ.get("USAGI_DATA")
    if mirror and (Path(mirror) / dataset.file).is_file():
        return _checked(Path(mirror) / dataset.file, dataset)
    cached = cache_folder() / dataset.file
    if cached.is_file():
        return cached
    if not download:
        where = f"{mirror} (USAGI_DATA)" if mirror else "USAGI_DATA, which is not set,"
        raise ConfigurationError(
            f"data set `{name}` is neither in {where} nor in {cache_folder()}; set USAGI_DATA to a folder that holds "
            f"{dataset.file}, or let it be downloaded from {dataset.source_url}"
        )
    return fetch(dataset, cached)


def cache_folder() -> Path:
    """`USAGI_CACHE`, or `~/.cache/usagi`."""
    configured = os.environ.get("USAGI_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "usagi"


def fetch(dataset: Dataset, target: Path) -> Path:
    """Downloads the official form, checks it, converts it, and moves the result to `target` in one step.

    Raises:
        ConfigurationError: the source cannot be reached, or serves something else than expected.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{dataset.name}.") as folder:
        downloaded, made = Path(folder) / "downloaded", Path(folder) / "made"
        _download(dataset, downloaded)
        digest = sha256_of(downloaded)
        if dataset.source_sha256 and digest != dataset.source_sha256:
            raise ConfigurationError(
                f"{dataset.source_url} served {downloaded.stat().st_size} bytes with sha256 {digest[:12]}…, expected "
                f"{dataset.source_bytes} with {dataset.source_sha256[:12]}…; try again, or set USAGI_DATA to a folder "
                f"that holds {dataset.file}"
            )
        if dataset.convert:
            dataset.convert(downloaded, made)  # checks the parts where the whole has no fixed digest
        else:
            downloaded.replace(made)
        made.replace(target)
    return target


def _download(dataset: Dataset, target: Path) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        with (
            urllib.request.urlopen(dataset.source_url, timeout=TIMEOUT_SECONDS) as response,  # noqa: S310 - from our table
            target.open("wb") as file,
            Progress(*columns) as bar,
        ):
            task = bar.add_task(dataset.name, total=dataset.source_bytes or None)
            while block := response.read(BLOCK):
                file.write(block)
                bar.advance(task, len(block))
    except (urllib.error.URLError, OSError) as error:
        raise ConfigurationError(
            f"data set `{dataset.name}` could not be downloaded from {dataset.source_url}: {error}; "
            f"set USAGI_DATA to a folder that holds {dataset.file}"
        ) from error


_verified: set[tuple[str, int, int]] = set()


def _checked(path: Path, dataset: Dataset) -> Path:
    """Compares the mirror's file with the table, once in a process for an unchanged file."""
    status = path.stat()
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    if key not in _verified:
        digest = sha256_of(path)
        if digest != dataset.sha256:
            raise ConfigurationError(
                f"{path} has {status.st_size} bytes with sha256 {digest[:12]}…, expected {dataset.bytes} with "
                f"{dataset.sha256[:12]}…; copy it again, or unset USAGI_DATA to download it"
            )
        _verified.add(key)
    return path
