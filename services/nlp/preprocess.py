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
_IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)
"""Chinese characters, each a word to BERT."""
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


def split_bert(text: str) -> list[str]:
    """The words of a text as BERT's own uncased tokenizer cuts it: lower case, accents gone, every sign by itself."""
    cleaned = "".join(f" {c} " if _is_ideograph(c) else _cleaned(c) for c in text)
    plain = "".join(c for c in unicodedata.normalize("NFD", cleaned.lower()) if unicodedata.category(c) != "Mn")
    return "".join(f" {c} " if _is_punctuation(c) else c for c in plain).split()


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


def _cleaned(character: str) -> str:
    """As BERT cleans text: white space becomes a space, and what controls, formats or stands for no character goes."""
    category = unicodedata.category(character)
    if character in "\t\n\r" or category == "Zs":
        return " "
    return "" if category in ("Cc", "Cf", "Co", "Cs") or character == "\ufffd" else character


def _is_ideograph(character: str) -> bool:
    code = ord(character)
    return any(first <= code <= last for first, last in _IDEOGRAPHS)


def _is_punctuation(character: str) -> bool:
    """All signs of ASCII, `$` and `^` among them, and what Unicode calls punctuation."""
    sign = character.isascii() and character.isprintable() and not character.isalnum() and character != " "
    return sign or unicodedata.category(character).startswith("P")
