"""Builds random generators that depend only on the seed, a purpose and ids."""

import hashlib
from typing import SupportsIndex

import numpy as np


def sample_rng(seed: SupportsIndex, purpose: str, *ids: SupportsIndex | str) -> np.random.Generator:
    """Returns the random generator of (seed, purpose, ids), which is the same on every rank, worker and machine.

    Different arguments give independent generators. The bits come from Philox and never change, but another NumPy
    release may compute other numbers from them.

    Args:
        seed: the run's seed.
        purpose: name of what is drawn, for example "patch mask".
        ids: what the draw is for, for example the stream, epoch and number of a sample. NumPy and Python integers of
            equal value are equal.
    """
    # Python salts hash() in every process; a digest of the printed values is always the same.
    words = [repr(word if isinstance(word, str) else int(word)) for word in (seed, purpose, *ids)]
    key = hashlib.blake2b(",".join(words).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
