"""The data sets, by name. To add one: an entry here, and a `convert` if its official form differs from ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.data.flowers import flowers_from_tgz


@dataclass(frozen=True)
class Dataset:
    """One data set: how our file of it is called, and where its official form comes from."""

    name: str
    file: str
    """File name in `USAGI_DATA` and in the cache."""
    sha256: str
    """Of the mirror's file."""
    bytes: int
    """Of the mirror's file."""
    source_url: str
    """Official home."""
    source_sha256: str
    """Of what the official home serves."""
    source_bytes: int
    licence: str
    description: str
    convert: Callable[[Path, Path], None] | None = None
    """Makes our file (second) from the official one (first); None if they are the same file."""


DATASETS: Mapping[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="flowers",
            file="flowers.zip",
            sha256="ab2e3d8051ae23cc3b7e112e441dc75cd26ff5515f4e057b23f0430110f77784",
            bytes=55_227_438,
            source_url="http://download.tensorflow.org/example_images/flower_photos.tgz",
            source_sha256="4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c",
            source_bytes=228_813_984,
            licence="CC-BY; authors by file name in the LICENSE.txt of the official archive",
            description="tf_flowers: photos of five flowers, short side at most 224 pixels",
            convert=flowers_from_tgz,
        ),
    )
}
