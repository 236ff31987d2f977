"""Running text for the language models."""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

from shared.data.locate import locate


@dataclass(frozen=True)
class Text:
    """A corpus: its title, its data set, and the files of it that are read, in order."""

    title: str
    dataset: str
    files: tuple[str, ...]
    words_apart: bool = False
    """Whether spaces between words are to be taken out."""


TEXTS: Mapping[str, Text] = {
    "shakespeare": Text("tiny Shakespeare", "shakespeare", ("input.txt",)),
    "soseki": Text(
        "Natsume Soseki, seven novels",
        "soseki",
        tuple(f"{name}.txt" for name in ("bottyan", "gubizinsou", "kokoro", "kusamakura", "meian", "neko", "sanshiro")),
        words_apart=True,
    ),
}


@functools.lru_cache
def load_text(name: str) -> str:
    """The whole text; however its lines end, they end with a line feed here."""
    text = TEXTS[name]
    with zipfile.ZipFile(locate(text.dataset)) as archive:
        members = {member.rsplit("/", 1)[-1]: member for member in archive.namelist()}
        contents = "".join(archive.read(members[file]).decode() for file in text.files)
    contents = contents.replace("\r\n", "\n").replace("\r", "\n")
    return contents.replace(" ", "") if text.words_apart else contents


TRAIN_SHARE = 0.9
"""Of a text, from its beginning, trains; the rest is held back."""


def training_text(name: str) -> str:
    """The part that trains."""
    text = load_text(name)
    return text[: int(len(text) * TRAIN_SHARE)]


def held_back_text(name: str) -> str:
    """The part that validates."""
    text = load_text(name)
    return text[int(len(text) * TRAIN_SHARE) :]
