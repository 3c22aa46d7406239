"""Whether the samples of a source have the numbers that they had."""

import hashlib
from typing import ClassVar, Protocol

import numpy as np

from beit3_ds.data.fingerprint import HasFiles

_LOOKED_AT = 256


class Numbered(HasFiles, Protocol):
    """The samples of one source, by number."""

    is_last_open: ClassVar[bool]
    """Whether appending to the files may change the last sample: a text's last sequence is filled up."""

    def identity(self, index: int) -> bytes:
        """What tells a sample from others, whatever folder its files lie in."""


def numbering_digest(samples: Numbered, count: int) -> str:
    """A digest of the first `count` samples, which changes if samples are inserted, removed or ordered otherwise.

    Looks at the names of the files that hold them and at 256 samples, spread over all, of which one is the last:
    whatever shifts numbers shifts the last one's. So a source was only appended to if the digest of as many samples as
    it had is what it was. Not seen are samples that were exchanged for as many others in a file, between two that are
    looked at.
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
