"""Randomness that does not depend on history.

What an example looks like in an epoch is a function of (seed, epoch, index) and nothing else: not of the batch size, of
the worker that makes it, nor of what was drawn before. A resumed run therefore sees exactly what the uninterrupted one
saw.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from numpy.typing import NDArray


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy's old global generator and PyTorch, from which initialisation and dropout draw."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Generator for one example in one epoch."""
    return np.random.default_rng((seed, epoch, index))


def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """`[count]`: the order of the examples in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)
