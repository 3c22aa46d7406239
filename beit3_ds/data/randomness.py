"""Builds random generators from a seed, a purpose and ids."""

import hashlib
from typing import SupportsIndex

import numpy as np


def sample_rng(seed: SupportsIndex, purpose: str, *ids: SupportsIndex | str) -> np.random.Generator:
    """Returns a random generator; equal arguments give equal generators on every rank, worker and machine.

    Different arguments give independent generators. The random bits come from Philox and never change. However, another
    NumPy release may compute other numbers from these bits.

    Args:
        seed: the run's seed.
        purpose: name of the drawn quantity, for example "patch mask".
        ids: identify the object of the draw, for example the stream, epoch and index of a sample. NumPy and Python
            integers of equal value count as equal.
    """
    # Python salts hash() in every process; a digest of the printed values is always the same.
    words = [repr(word if isinstance(word, str) else int(word)) for word in (seed, purpose, *ids)]
    key = hashlib.blake2b(",".join(words).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
