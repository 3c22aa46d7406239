"""Builds random generators that depend only on the seed, a purpose and ids."""

import hashlib
from typing import SupportsIndex

import numpy as np


def sample_rng(seed: SupportsIndex, purpose: str, *ids: SupportsIndex | str) -> np.random.Generator:
    """Returns the random generator of (seed, purpose, ids), which is the same on every rank, worker and machine.

    Different arguments give independent generators. For example, masks do not change if augmentation draws one number
    more. The generator's bits come from Philox and never change, but a NumPy release may compute other numbers from
    them.

    Args:
        seed: the run's seed.
        purpose: name of the thing that is drawn, for example "patch mask".
        ids: identifiers of the object that it is drawn for, for example stream, epoch and sample. A NumPy integer
            equals the Python integer of its value.
    """
    # Python salts hash() in every process; a digest of the printed values is always the same.
    words = [repr(word if isinstance(word, str) else int(word)) for word in (seed, purpose, *ids)]
    key = hashlib.blake2b(",".join(words).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
