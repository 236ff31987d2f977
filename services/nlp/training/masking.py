"""The task of a masked language model (Devlin et al. 2019, section 3.1): which pieces are hidden, and behind what.

Of all pieces that are no special ones 15% are chosen, others for each batch (as RoBERTa does). Of the chosen 80% become
`[MASK]`, 10% any piece, 10% stay; the loss looks at the chosen ones only. A row with n pieces gets floor(.15 n + u) of
them, u uniform in [0, 1): 15% on average even for short sentences, where BERT's max(1, round(.15 n)) gives more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CHOSEN_SHARE, MASK_SHARE, RANDOM_SHARE = 0.15, 0.8, 0.1


@dataclass(frozen=True)
class SpecialIds:
    """What masking must know of a vocabulary."""

    mask: int
    never: frozenset[int]
    """Ids that are never chosen and never put in another's place."""
    size: int
    """Of the vocabulary."""


@dataclass(frozen=True)
class MaskedRows:
    """Rows with gaps."""

    tokens: NDArray[np.int64]
    """`[B, T]`, what the model reads."""
    chosen: NDArray[np.bool_]
    """`[B, T]`, where the loss looks; the answers are the original tokens there."""


def mask_tokens(tokens: NDArray[np.int64], ids: SpecialIds, rng: np.random.Generator) -> MaskedRows:
    """Chooses and hides pieces of `[B, T]` tokens; the argument stays as it is."""
    allowed = ~np.isin(tokens, sorted(ids.never))
    wanted = np.floor(CHOSEN_SHARE * allowed.sum(1) + rng.random(len(tokens))).astype(int)
    keys = np.where(allowed, rng.random(tokens.shape), 2.0)
    ranks = keys.argsort(1).argsort(1)  # of each position among its row's, in random order, the allowed ones first
    chosen = ranks < wanted[:, None]
    fate = rng.random(tokens.shape)
    words = np.setdiff1d(np.arange(ids.size), sorted(ids.never))
    hidden = np.where(chosen & (fate < MASK_SHARE), ids.mask, tokens)
    replaced = chosen & (fate >= MASK_SHARE) & (fate < MASK_SHARE + RANDOM_SHARE)
    return MaskedRows(np.where(replaced, rng.choice(words, tokens.shape), hidden), chosen)
