"""Computes a digest of the first samples of a source, which shows whether a source has only grown at its end."""

import hashlib
from typing import ClassVar, Protocol

import numpy as np

from beit3_ds.data.files.fingerprint import HasFiles

_NUM_COMPARED = 256


class IdentifiedSamples(HasFiles, Protocol):
    """Declares the interface of samples that can be recognised even if their numbers change."""

    is_last_open: ClassVar[bool]
    """Whether the last sample may change if lines are added to a file, as the last sequence of a text file does."""

    def identity(self, index: int) -> bytes:
        """Returns bytes that identify a sample, independent of the folder of its files."""


def prefix_digest(samples: IdentifiedSamples, count: int) -> str:
    """Returns a digest of the first `count` samples, which changes if samples among them are inserted or removed.

    The digest covers the names of the files that contain these samples, and 256 evenly spread samples. The last of the
    256 is sample `count` - 1, or sample `count` - 2 if appending may change the last sample (`is_last_open`). If a
    source had `count` samples before and the digest of its first `count` samples is the same now, the source has only
    grown at its end. The digest does not detect replaced or swapped samples that lie between two of the 256.
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
