"""From text to the words that the models know, and from words back to text; standard library only.

Training and serving share it. English is separated as the corpus separates it: lower case, punctuation apart, and an
apostrophe begins a word of its own (`can 't`, `i 'm`). Japanese comes from a model as words and is written without
spaces.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_WORD = re.compile(
    r"""
    (?:[^\W\d_]\.){2,}                          # p.m.
    | '?[^\W\d_]+(?:-[^\W\d_]+)*                # can, 't, well-known
    | \d+(?:[.,:]\d+)*                         # 10, 2,000, 3.5, 7:30
    | \.{2,} | ''                              # an ellipsis, a quotation mark
    | [^\w\s] | _                              # other signs, each alone
    """,
    re.VERBOSE,
)
_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": "''", "”": "''", '"': "''", "´": "'", "`": "'"})
_ABBREVIATIONS = frozenset({"mr", "mrs", "ms", "dr", "st"})


def split_english(text: str) -> list[str]:
    """The words of an English sentence as the corpus would have them; control characters are gone."""
    plain = unicodedata.normalize("NFKC", text.translate(_QUOTES)).translate(_QUOTES).lower()
    words: list[str] = []
    for word in _WORD.findall("".join(map(_visible, plain))):
        if word == "." and words and words[-1] in _ABBREVIATIONS:
            words[-1] += "."
        else:
            words.append(word)
    return words


def join_japanese(words: Sequence[str]) -> str:
    """Words as Japanese is written: without spaces, but for those between two words of Latin letters or digits."""
    text = ""
    for word in words:
        if text and _is_latin(text[-1]) and _is_latin(word[0]):
            text += " "
        text += word
    return text


def _visible(character: str) -> str:
    """The character; a space for one that controls, nothing for one that only formats, such as a soft hyphen."""
    category = unicodedata.category(character)
    if category == "Cc" or character == "\u200b":
        return " "
    return "" if category == "Cf" or "\ufe00" <= character <= "\ufe0f" else character


def _is_latin(character: str) -> bool:
    return character.isascii() and character.isalnum()
