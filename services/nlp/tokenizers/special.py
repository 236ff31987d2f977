"""The ids that mean no text, the same in every vocabulary of this service."""

from __future__ import annotations

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIAL_PIECES = ("<pad>", "<bos>", "<eos>", "<unk>")
