"""Fashion-MNIST: the format of its files, its official archive, its parts, and the tasks."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import tarfile

import numpy as np
import pytest

from services.vision.training.fashion import load_clothes
from services.vision.training.tasks import TASKS, task_of_labels
from services.vision.training.train import TrainConfig, load_parts
from shared.data import fashion
from shared.data.catalog import DATASETS
from shared.data.locate import locate
from shared.errors import ConfigurationError


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def test_idx_by_hand():
    data = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6])
    assert fashion.read_idx(data).tolist() == [[1, 2, 3], [4, 5, 6]]


SHORT = idx(np.zeros(3, np.uint8))[:-1]


@pytest.mark.parametrize("spoilt", [b"", b"\0\0", b"\0\0\x0d\1", SHORT, b"\0\0\x08\3\0"])
def test_a_damaged_idx_file_is_refused(spoilt):
    with pytest.raises(ConfigurationError, match="idx file"):
        fashion.read_idx(spoilt)


@pytest.fixture
def official(tmp_path, monkeypatch):
    """An archive of the official repository's layout with four tiny files, whose digests are expected."""
    rng = np.random.default_rng(0)
    contents = {}
    for part, count in (("train", 6), ("t10k", 4)):
        contents[f"{part}-images-idx3-ubyte.gz"] = idx(rng.integers(0, 256, (count, 28, 28), np.uint8))
        contents[f"{part}-labels-idx1-ubyte.gz"] = idx(rng.integers(0, 10, count, np.uint8))
    monkeypatch.setattr(fashion, "CONTENTS", {n: hashlib.sha256(c).hexdigest() for n, c in contents.items()})
    path = tmp_path / "official.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            packed = gzip.compress(content)
            info = tarfile.TarInfo(f"fashion-mnist-master/data/fashion/{name}")
            info.size = len(packed)
            archive.addfile(info, io.BytesIO(packed))
    return path


def test_official_archive_becomes_ours(official, tmp_path):
    fashion.fashion_from_tgz(official, tmp_path / "ours.zip")
    images, labels = fashion.read_fashion(tmp_path / "ours.zip", "t10k")
    assert (images.shape, labels.shape) == ((4, 28, 28), (4,))


def test_another_archive_is_refused(official, tmp_path, monkeypatch):
    monkeypatch.setitem(fashion.CONTENTS, "t10k-labels-idx1-ubyte.gz", "0" * 64)
    with pytest.raises(ConfigurationError, match="unpacks to sha256"):
        fashion.fashion_from_tgz(official, tmp_path / "ours.zip")
    monkeypatch.setitem(fashion.CONTENTS, "another.gz", "0" * 64)
    with pytest.raises(ConfigurationError, match=r"holds no another\.gz|unpacks"):
        fashion.fashion_from_tgz(official, tmp_path / "ours.zip")


def test_tasks_are_found_by_their_labels():
    assert {task_of_labels(task.labels).name for task in TASKS.values()} == set(TASKS)
    assert all(task.dataset in DATASETS for task in TASKS.values())
    with pytest.raises(ConfigurationError, match="no task has the labels"):
        task_of_labels(("cat", "dog"))


def test_crops_never_exceed_the_picture():
    config = TrainConfig(data="fashion", epochs=6)
    assert {config.size_at(epoch) for epoch in range(6)} == {28}
    assert config.folder.name == "finetune-seed0"
    assert config.folder.parent.name == "fashion-efficientnet-lite0"


@pytest.mark.data
def test_parts_of_the_real_set():
    try:
        locate("fashion_mnist", download=False)
    except ConfigurationError as error:
        pytest.skip(error.message)
    parts = load_parts(True, TASKS["fashion"])
    assert tuple(map(len, (parts.train, parts.val, parts.test))) == TASKS["fashion"].quick
    train, val, test = (load_clothes(split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (55_000, 5_000, 10_000)
    assert not set(train.names) & (set(val.names) | set(test.names))
    assert train.images[0].shape == (28, 28, 3)
    assert np.bincount(test.labels).tolist() == [1_000] * 10
    with pytest.raises(ConfigurationError, match="expected `train`, `val` or `test`"):
        load_clothes("tset")
