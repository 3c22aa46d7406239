"""Random generators that are a pure function of what they are drawn for."""

import hashlib
from typing import SupportsIndex

import numpy as np


def sample_rng(seed: SupportsIndex, purpose: str, *ids: SupportsIndex | str) -> np.random.Generator:
    """Returns the generator of (seed, purpose, ids): the same on every rank, worker, machine and resume.

    Different arguments give independent streams, so masks do not move when augmentation draws one number more. The
    bits are Philox's and fixed for ever; what NumPy's `Generator` makes of them may change with a NumPy release.

    Args:
        seed: the run's seed.
        purpose: what is drawn, for example "patch mask".
        ids: what it is drawn for, for example stream, epoch and sample; NumPy integers count as plain ones.
    """
    # Python's hash() is salted anew in every process; a digest of the printed values is not.
    words = [repr(word if isinstance(word, str) else int(word)) for word in (seed, purpose, *ids)]
    key = hashlib.blake2b(",".join(words).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
