"""Data sets: where they are looked for, how they are fetched, and what is said when they are not to be had."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from shared.data import locate as module
from shared.data.catalog import DATASETS
from shared.data.flowers import SHORT_SIDE, shrink_jpeg
from shared.data.locate import cache_folder, locate
from shared.errors import ConfigurationError
from shared.images import decode_image


def jpeg(height: int, width: int, colour: tuple[int, int, int] = (40, 80, 200)) -> bytes:
    return cv2.imencode(".jpg", np.full((height, width, 3), colour, np.uint8))[1].tobytes()


PHOTOS = {"daisy/1_a.jpg": jpeg(300, 500), "roses/2_b.jpg": jpeg(100, 90), "tulips/3_c_n.jpg": jpeg(320, 240)}


def official_archive() -> bytes:
    """A tiny archive in the layout of flower_photos.tgz."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in [("LICENSE.txt", b"authors"), *PHOTOS.items()]:
            info = tarfile.TarInfo(f"flower_photos/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def folders(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """An empty mirror and an empty cache."""
    mirror, cache = tmp_path / "mirror", tmp_path / "cache"
    mirror.mkdir()
    monkeypatch.setenv("USAGI_DATA", str(mirror))
    monkeypatch.setenv("USAGI_CACHE", str(cache))
    return mirror, cache


@pytest.fixture
def home(tmp_path, monkeypatch) -> Iterator[Path]:
    """The official home, played by a server on the loopback; `flowers` points there."""
    served = tmp_path / "served"
    served.mkdir()
    (served / "flower_photos.tgz").write_bytes(official_archive())

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    content = official_archive_bytes(served)
    dataset = dataclasses.replace(
        DATASETS["flowers"],
        source_url=f"http://127.0.0.1:{server.server_port}/flower_photos.tgz",
        source_sha256=hashlib.sha256(content).hexdigest(),
        source_bytes=len(content),
    )
    monkeypatch.setattr(module, "DATASETS", {"flowers": dataset})
    yield served
    server.shutdown()
    server.server_close()


def official_archive_bytes(served: Path) -> bytes:
    return (served / "flower_photos.tgz").read_bytes()


def test_download_is_checked_converted_and_cached(folders, home):
    path = locate("flowers")

    assert path == folders[1] / "flowers.zip"
    assert [entry.name for entry in folders[1].iterdir()] == ["flowers.zip"]
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == sorted(PHOTOS)
        sizes = {name: decode_image(archive.read(name)).shape[:2] for name in archive.namelist()}
        assert archive.read("roses/2_b.jpg") == PHOTOS["roses/2_b.jpg"]  # small already: not encoded again
    assert sizes == {"daisy/1_a.jpg": (224, 373), "roses/2_b.jpg": (100, 90), "tulips/3_c_n.jpg": (299, 224)}

    (home / "flower_photos.tgz").unlink()
    assert locate("flowers") == path  # from the cache


def test_conversion_keeps_the_picture():
    y, x = np.mgrid[0:448, 0:600]
    rgb = np.stack([x * 255 / 600, y * 255 / 448, 0 * x], axis=-1).astype(np.uint8)
    data = cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])[1].tobytes()

    small = decode_image(shrink_jpeg(data))

    assert small.shape == (SHORT_SIDE, 300, 3)
    expected = cv2.resize(rgb, (300, SHORT_SIDE), interpolation=cv2.INTER_AREA)
    assert np.abs(small.astype(int) - expected).mean() < 2  # the loss of a JPEG of quality 90


def test_download_of_something_else_is_refused_and_leaves_nothing(folders, home):
    (home / "flower_photos.tgz").write_bytes(b"<html>please log in</html>")
    with pytest.raises(ConfigurationError, match=r"sha256.*expected.*USAGI_DATA"):
        locate("flowers")
    assert list(folders[1].iterdir()) == []


def test_unreachable_home_says_which_variable_helps(folders, home):
    (home / "flower_photos.tgz").unlink()
    with pytest.raises(ConfigurationError, match=r"could not be downloaded.*USAGI_DATA"):
        locate("flowers")
    assert list(folders[1].iterdir()) == []


def test_mirror_comes_first_and_is_checked(folders, monkeypatch):
    content = b"a mirror's file"
    dataset = dataclasses.replace(DATASETS["flowers"], sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(module, "DATASETS", {"flowers": dataset})
    (folders[0] / "flowers.zip").write_bytes(content)
    assert locate("flowers") == folders[0] / "flowers.zip"

    (folders[0] / "flowers.zip").write_bytes(content + b" with more")
    with pytest.raises(ConfigurationError, match=r"expected.*copy it again"):
        locate("flowers")


def test_without_download_it_says_where_it_looked(folders):
    with pytest.raises(ConfigurationError) as raised:
        locate("flowers", download=False)
    assert "USAGI_DATA" in raised.value.message
    assert str(folders[1]) in raised.value.message
    assert DATASETS["flowers"].source_url in raised.value.message


def test_unknown_name_lists_the_known(folders):
    with pytest.raises(ConfigurationError, match=r"`moths` is unknown; known: flowers"):
        locate("moths")


def test_cache_folder_without_a_setting(monkeypatch):
    monkeypatch.delenv("USAGI_CACHE", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "usagi"


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=lambda dataset: dataset.name)
def test_table(dataset):
    assert DATASETS[dataset.name] is dataset
    assert all(len(digest) == 64 and int(digest, 16) for digest in (dataset.sha256, dataset.source_sha256))
    assert dataset.licence
    assert dataset.source_url.startswith("http")
