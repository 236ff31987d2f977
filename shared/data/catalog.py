"""The data sets, by name. To add one: an entry here, and a `convert` if its official form differs from ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.data.fashion import fashion_from_tgz
from shared.data.flowers import flowers_from_tgz
from shared.data.texts import enja_from_tgz, shakespeare_from_txt, soseki_from_tgz


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
    """Of what the official home serves; empty where it is packed anew at each call; then `convert` checks the parts."""
    source_bytes: int
    """Of what the official home serves; 0 where that is not fixed."""
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
        Dataset(
            name="fashion_mnist",
            file="fashion_mnist.zip",
            sha256="f24912464facc97859fa97cd47c06aab3314fe853a779a83a57ea6cf6657eb4b",
            bytes=30_879_081,
            source_url="https://github.com/zalandoresearch/fashion-mnist/archive/refs/heads/master.tar.gz",
            source_sha256="",
            source_bytes=0,
            licence="MIT; Zalando SE",
            description="Fashion-MNIST: 70,000 grey pictures of clothes, 28 x 28, ten classes",
            convert=fashion_from_tgz,
        ),
        Dataset(
            name="enja",
            file="enja.zip",
            sha256="fd4b82c16b0cd7651edfd3308cb02d354cc4d007067e8e3d91f9eb57ba49866d",
            bytes=1_335_942,
            source_url="https://github.com/odashi/small_parallel_enja/archive/refs/heads/master.tar.gz",
            source_sha256="",
            source_bytes=0,
            licence="CC-BY (Tanaka corpus, now part of Tatoeba)",
            description="small_parallel_enja: 50,000 + 500 short sentences, English and Japanese, words apart",
            convert=enja_from_tgz,
        ),
        Dataset(
            name="shakespeare",
            file="shakespeare.zip",
            sha256="3dc5ac08060c2bead87e149f2d0225eafea2d89ce002674ea52847f61aa681f1",
            bytes=435_169,
            source_url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            source_sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            source_bytes=1_115_394,
            licence="public domain",
            description="tiny Shakespeare: 1.1 MB of plays",
            convert=shakespeare_from_txt,
        ),
        Dataset(
            name="soseki",
            file="soseki.zip",
            sha256="5745fb41c0c6932f64d54c90717fd257d4b4d04928a115ff74e00d07c9b62b29",
            bytes=1_478_021,
            source_url="https://github.com/segavvy/wakatigaki-aozorabunko/archive/refs/heads/master.tar.gz",
            source_sha256="",
            source_bytes=0,
            licence="public domain; Aozora Bunko, typed in and proof-read by its volunteers",
            description="seven novels of Natsume Soseki, words separated by MeCab",
            convert=soseki_from_tgz,
        ),
    )
}
