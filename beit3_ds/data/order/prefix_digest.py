"""Computes a digest of a source's first samples. Inserting or removing a sample among the first samples changes the
digest.
"""

import hashlib
from typing import ClassVar, Protocol

import numpy as np

from beit3_ds.data.files.fingerprint import HasFiles

_NUM_COMPARED = 256


class IdentifiedSamples(HasFiles, Protocol):
    """Interface of samples that can be recognised even if their indices change."""

    is_last_open: ClassVar[bool]
    """Whether the last sample may change if lines are appended to a file. True for text, where new lines may join the
    last sequence."""

    def identity(self, index: int) -> bytes:
        """Returns bytes that identify a sample and do not depend on the folder of its files."""


def prefix_digest(samples: IdentifiedSamples, count: int) -> str:
    """Returns a digest of the first `count` samples; the digest changes if samples among them are inserted or removed.

    If the digest is unchanged, the source counts as unchanged, or as grown at its end.

    The digest covers the names of the files with these samples, and 256 evenly spread samples. The last of the `count`
    samples is excluded if it may change when lines are appended (`is_last_open`). Replaced or swapped samples are
    detected only among the 256.
    """
    last = count - 1 - samples.is_last_open
    digest, start = hashlib.sha256(), 0
    for file in samples.files():
        if start >= count:
            break
        digest.update(repr((file.name, min(file.num_samples, count - start))).encode("utf-8", "surrogatepass"))
        start += file.num_samples
    for index in np.unique(np.linspace(0, last, _NUM_COMPARED).round().astype(np.int64)) if last >= 0 else ():
        identity = samples.identity(int(index))
        digest.update(b"%d:%d:" % (index, len(identity)) + identity)
    return digest.hexdigest()[:32]
