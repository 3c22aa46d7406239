"""Computes the digest of the first samples of a source, which tells whether the source was only appended to."""

import hashlib
from typing import ClassVar, Protocol

import numpy as np

from beit3_ds.data.files.fingerprint import HasFiles

_NUM_COMPARED = 256


class IdentifiedSamples(HasFiles, Protocol):
    """Declares the interface of samples that can be recognised even if their numbers change."""

    is_last_open: ClassVar[bool]
    """Whether appending to the files may change the last sample, as it changes the last sequence of a text."""

    def identity(self, index: int) -> bytes:
        """Returns bytes that identify a sample, independent of the folder of its files."""


def prefix_digest(samples: IdentifiedSamples, count: int) -> str:
    """Returns a digest of the first `count` samples, which changes if samples are inserted, removed or reordered.

    The digest covers the names of the files that hold these samples, and 256 evenly spread samples, the last closed one
    among them: every shift of sample numbers changes it. A source that had `count` samples before, and still has the
    same digest of them, was only appended to. The digest does not change if samples between two of the 256 are replaced
    by the same number of others.
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
