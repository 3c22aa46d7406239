"""Tells whether the samples of a source still have the same numbers."""

import hashlib
from typing import ClassVar, Protocol

import numpy as np

from beit3_ds.data.files.fingerprint import HasFiles

_LOOKED_AT = 256


class IdentifiedSamples(HasFiles, Protocol):
    """The samples of one source, by number."""

    is_last_open: ClassVar[bool]
    """Whether appending to the files may change the last sample, as it does for the last sequence of a text."""

    def identity(self, index: int) -> bytes:
        """Returns bytes that tell a sample from others, whatever folder its files are in."""


def prefix_digest(samples: IdentifiedSamples, count: int) -> str:
    """Returns a digest of the first `count` samples, which changes if samples are inserted, removed or reordered.

    It covers the names of the files that hold the samples, and 256 evenly spread samples including the last one: any
    shift of numbers moves the last one. If the digest of a source's earlier number of samples is unchanged, the source
    was only appended to. Samples that were replaced by the same number of others, between two of the 256, are not
    detected.
    """
    last = count - 1 - samples.is_last_open
    digest, start = hashlib.sha256(), 0
    for file in samples.files():
        if start >= count:
            break
        digest.update(repr((file.name, min(file.num_samples, count - start))).encode("utf-8", "surrogatepass"))
        start += file.num_samples
    for index in np.unique(np.linspace(0, last, _LOOKED_AT).round().astype(np.int64)) if last >= 0 else ():
        identity = samples.identity(int(index))
        digest.update(b"%d:%d:" % (index, len(identity)) + identity)
    return digest.hexdigest()[:32]
