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
from shared.data.fashion import fashion_from_tgz
from shared.data.flowers import SHORT_SIDE, shrink_jpeg
from shared.data.locate import cache_folder, locate
from shared.data.texts import ENJA, SOSEKI, enja_from_tgz, shakespeare_from_txt, soseki_from_tgz
from shared.errors import ConfigurationError
from shared.images import decode_image

CHECKS_PARTS = {enja_from_tgz: ENJA, soseki_from_tgz: SOSEKI}
"""Converters of archives without a lasting digest, and the digests of the files inside that they check."""


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
    with pytest.raises(ConfigurationError, match=r"`moths` is unknown; known: enja, fashion_mnist, flowers"):
        locate("moths")


def test_cache_folder_without_a_setting(monkeypatch):
    monkeypatch.delenv("USAGI_CACHE", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "usagi"


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=lambda dataset: dataset.name)
def test_table(dataset):
    assert DATASETS[dataset.name] is dataset
    assert len(dataset.sha256) == 64
    assert int(dataset.sha256, 16)
    if dataset.convert in (*CHECKS_PARTS, fashion_from_tgz):  # packed anew at each call
        assert (dataset.source_sha256, dataset.source_bytes) == ("", 0)
    else:
        assert len(dataset.source_sha256) == 64
        assert int(dataset.source_sha256, 16)
    assert dataset.licence
    assert dataset.source_url.startswith("http")


def tgz(path: Path, contents: dict[str, bytes]) -> Path:
    """An archive as GitHub packs a repository: everything in one folder."""
    with tarfile.open(path, mode="w:gz") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"repository-master/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def read_zip(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def mirror(name: str) -> Path:
    try:
        return locate(name, download=False)
    except ConfigurationError as error:
        pytest.skip(error.message)


def digests(contents: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def test_corpus_in_parts_is_joined_in_order_and_the_rest_left_alone(tmp_path, monkeypatch):
    wanted = {"dev.en": b"d\n", "dev.ja": b"D\n", "train.en": b"a\nb\nc\n", "train.ja": b"A\nB\n"}
    packed = {"train.en.001": b"b\n", "train.en.000": b"a\n", "train.en.002": b"c\n", "train.en.vocab.4k": b"no"}
    packed |= {"train.ja.000": b"A\n", "train.ja.001": b"B\n", "test.en": b"secret", "dev.en": b"d\n", "dev.ja": b"D\n"}
    monkeypatch.setattr("shared.data.texts.ENJA", digests(wanted))

    enja_from_tgz(tgz(tmp_path / "in.tgz", packed), tmp_path / "out.zip")

    assert read_zip(tmp_path / "out.zip") == wanted


@pytest.mark.parametrize(("convert", "expected"), CHECKS_PARTS.items(), ids=["enja", "soseki"])
def test_a_part_that_is_missing_or_changed_is_refused(convert, expected, tmp_path):
    others = dict.fromkeys(expected, b"something else")
    with pytest.raises(ConfigurationError, match=rf"{next(iter(expected))} .* expected"):
        convert(tgz(tmp_path / "changed.tgz", others), tmp_path / "out.zip")
    with pytest.raises(ConfigurationError, match=r"holds no .*official repository"):
        convert(tgz(tmp_path / "empty.tgz", {}), tmp_path / "out.zip")
    assert not (tmp_path / "out.zip").exists()


@pytest.mark.data
@pytest.mark.parametrize(("convert", "name"), [(enja_from_tgz, "enja"), (soseki_from_tgz, "soseki")])
def test_the_mirror_holds_what_the_official_home_would_give(convert, name, tmp_path):
    ours = read_zip(mirror(name))

    convert(tgz(tmp_path / "in.tgz", ours), tmp_path / "out.zip")

    made = read_zip(tmp_path / "out.zip")
    assert made == {member: ours[member] for member in made}
    assert set(ours) - set(made) == {"README.md"}


@pytest.mark.data
def test_shakespeare_is_the_official_text_in_a_zip(tmp_path):
    ours = read_zip(mirror("shakespeare"))
    assert hashlib.sha256(ours["input.txt"]).hexdigest() == DATASETS["shakespeare"].source_sha256

    (tmp_path / "input.txt").write_bytes(ours["input.txt"])
    shakespeare_from_txt(tmp_path / "input.txt", tmp_path / "out.zip")

    assert read_zip(tmp_path / "out.zip") == ours
