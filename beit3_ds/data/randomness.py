"""Builds random generators that depend on their purpose alone."""

import hashlib
from typing import SupportsIndex

import numpy as np


def sample_rng(seed: SupportsIndex, purpose: str, *ids: SupportsIndex | str) -> np.random.Generator:
    """Returns the generator of (seed, purpose, ids): the same on every rank, worker and machine, and after a resume.

    Different arguments give independent generators, so masks stay the same if augmentation draws one number more. The
    bits come from Philox and never change. The numbers that NumPy's `Generator` computes from them may change with a
    NumPy release.

    Args:
        seed: the run's seed.
        purpose: what is drawn, for example "patch mask".
        ids: what is drawn for, for example stream, epoch and sample; NumPy integers count as plain ones.
    """
    # Python salts hash() in every process; a digest of the printed values is always the same.
    words = [repr(word if isinstance(word, str) else int(word)) for word in (seed, purpose, *ids)]
    key = hashlib.blake2b(",".join(words).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
