"""Divides the flower photos into train, validation and test: `python -m services.vision.training.split`.

By the SHA-1 of the file name, so that the division needs no random state and survives photos being added.
Near-duplicates (the same scene shot twice, the same photo uploaded twice) would leak from train into test, so they are
found first, by a perceptual hash confirmed by the correlation of the pixels, and each group follows its first member by
name. The set holds 19 such pairs; one of them is the same photo labelled both roses and tulips (15922772266).
The list is committed as `flowers_split.csv`; a test makes it again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tyro
from numpy.typing import NDArray

from shared.artifacts import write_atomically
from shared.data.locate import locate
from shared.images import decode_image

SPLIT_FILE = Path(__file__).with_name("flowers_split.csv")
TRAIN_SHARE, VAL_SHARE = 0.7, 0.1
MAX_HASH_DISTANCE = 10
"""Of 64 bits; a candidate pair only, the pixels decide."""
MIN_CORRELATION = 0.95
"""Of the grey thumbnails; two different photos of one species rarely pass 0.9."""


@dataclass(frozen=True)
class SplitConfig:
    """Makes the committed division of the flower photos again."""

    output: Path = SPLIT_FILE
    """File to write."""


@dataclass(frozen=True)
class SplitRow:
    """One photo: `file` inside the archive, its `split`, and the first member of its group of near-duplicates."""

    file: str
    split: str
    group: str


def split_of(name: str) -> str:
    """`train`, `val` or `test` for a file name, by its SHA-1."""
    position = int(hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()[:8], 16) / 2**32
    if position < TRAIN_SHARE:
        return "train"
    return "val" if position < TRAIN_SHARE + VAL_SHARE else "test"


def difference_hash(rgb: NDArray[np.uint8]) -> int:
    """dHash: 64 bits, each saying whether brightness rises from one cell to the next of a 9x8 thumbnail."""
    grey = cv2.resize(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), (9, 8), interpolation=cv2.INTER_AREA)
    bits = (grey[:, 1:] > grey[:, :-1]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def thumbnail(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Grey 32x32 thumbnail, flattened to `[1024]`, with mean 0 and length 1, so that a dot product is a correlation."""
    grey = cv2.resize(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), (32, 32), interpolation=cv2.INTER_AREA)
    centred = grey.astype(np.float32).ravel() - np.float32(grey.mean())
    return np.asarray(centred / max(float(np.linalg.norm(centred)), 1e-6), np.float32)


def group_duplicates(photos: Mapping[str, NDArray[np.uint8]]) -> dict[str, str]:
    """File name -> first name of its group. Groups are the connected components of the near-duplicate relation."""
    names = sorted(photos)
    hashes = np.array([difference_hash(photos[name]) for name in names], np.uint64)
    thumbnails = np.stack([thumbnail(photos[name]) for name in names])
    first = list(range(len(names)))

    def root(index: int) -> int:
        while first[index] != index:
            index = first[index]
        return index

    for one in range(len(names)):
        near = np.flatnonzero(np.bitwise_count(hashes[one + 1 :] ^ hashes[one]) <= MAX_HASH_DISTANCE) + one + 1
        for other in near[thumbnails[near] @ thumbnails[one] >= MIN_CORRELATION]:
            low, high = sorted((root(one), root(int(other))))
            first[high] = low
    return {name: names[root(index)] for index, name in enumerate(names)}


def make_split(archive: Path) -> list[SplitRow]:
    """Division of every photo in the archive, by name."""
    with zipfile.ZipFile(archive) as file:
        names = sorted(name for name in file.namelist() if name.endswith(".jpg"))
        groups = group_duplicates({name: decode_image(file.read(name)) for name in names})
    return [SplitRow(name, split_of(groups[name]), groups[name]) for name in names]


def render_split(rows: list[SplitRow]) -> str:
    """The list as CSV text."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "split", "group"])
    writer.writerows([row.file, row.split, row.group] for row in rows)
    return text.getvalue()


def read_split(path: Path = SPLIT_FILE) -> list[SplitRow]:
    """Reads the committed list."""
    with path.open(encoding="utf-8", newline="") as file:
        return [SplitRow(**row) for row in csv.DictReader(file)]


def main(config: SplitConfig) -> None:
    """Writes the list and prints how many photos each part holds."""
    rows = make_split(locate("flowers"))
    write_atomically(config.output, render_split(rows))
    for part in ("train", "val", "test"):
        print(part, sum(row.split == part for row in rows))


if __name__ == "__main__":
    main(tyro.cli(SplitConfig, description=__doc__))
