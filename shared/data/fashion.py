"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747): 70,000 grey pictures of clothes, 28 x 28, ten classes.

The four files of the official repository are gzipped arrays in the 'idx' format of MNIST: two zero bytes, the type (8:
uint8), the number of dimensions, each dimension as a big-endian 32-bit number, then the values.
"""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from shared.errors import ConfigurationError

LABELS = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
"""As the set numbers them."""


CONTENTS = {
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
}
"""SHA-256 of what each file unpacks to; gzip itself may pack the same values in other bytes."""


def fashion_from_tgz(source: Path, target: Path) -> None:
    """Writes our zip from the archive of the official repository.

    Raises:
        ConfigurationError: a file is missing or another one.
    """
    contents: dict[str, bytes] = {}
    with tarfile.open(source, "r:gz") as archive:
        for member in archive.getmembers():
            name = PurePosixPath(member.name).name
            content = archive.extractfile(member) if name in CONTENTS else None
            if content is not None:
                contents[name] = content.read()
    for name, digest in CONTENTS.items():
        if name not in contents:
            raise ConfigurationError(f"{source} holds no {name}; is it the archive of the official repository?")
        found = hashlib.sha256(gzip.decompress(contents[name])).hexdigest()
        if found != digest:
            raise ConfigurationError(f"{name} in {source} unpacks to sha256 {found[:12]}…, expected {digest[:12]}…")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as output:
        for name in sorted(contents):
            output.writestr(zipfile.ZipInfo(name, date_time=(2026, 1, 1, 0, 0, 0)), contents[name])


def read_fashion(archive: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pictures `[N, 28, 28]` and labels `[N]` of `train` (60,000) or `t10k` (10,000).

    Raises:
        ConfigurationError: no such part, or a damaged one.
    """
    if part not in ("train", "t10k"):
        raise ConfigurationError(f"Fashion-MNIST has no part `{part}`, expected `train` or `t10k`")
    with zipfile.ZipFile(archive) as file:
        images = read_idx(gzip.decompress(file.read(f"{part}-images-idx3-ubyte.gz")))
        labels = read_idx(gzip.decompress(file.read(f"{part}-labels-idx1-ubyte.gz")))
    return images, labels.astype(np.int64)


def read_idx(data: bytes) -> NDArray[np.uint8]:
    """An array of the idx format.

    Raises:
        ConfigurationError: not of this format, or cut short.
    """
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ConfigurationError("not an idx file of bytes: it does not begin with 00 00 08")
    header = 4 + 4 * data[3]
    if len(data) < header:
        raise ConfigurationError(f"idx file of {len(data)} bytes ends inside its header; get it again")
    shape = tuple(np.frombuffer(data[4:header], ">u4").astype(int))
    values = np.frombuffer(data, np.uint8, offset=header)
    if values.size != int(np.prod(shape)):
        raise ConfigurationError(f"idx file of shape {shape} holds {values.size} values; get it again")
    return values.reshape(shape)
