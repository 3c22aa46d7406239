"""Computes fingerprints of sources, with which ranks compare the files that they found."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, TypedDict


class SourceFile(NamedTuple):
    """Describes a file of a source for the comparison between ranks."""

    name: str
    """Path of the file inside the folder that the config names, because that folder may differ between hosts."""
    num_bytes: int | None
    """Size of the file; None if it is not looked up, because millions of files would take one request each."""
    num_samples: int
    """Samples in the file."""


class HasFiles(Protocol):
    """Declares the interface of samples that list the files of their source."""

    def __len__(self) -> int:
        """Returns the number of samples, broken ones included."""

    def files(self) -> Iterable[SourceFile]:
        """Returns the files of the source, in the order of its samples."""


class SourceFingerprint(TypedDict):
    """Identifies the samples of a source and their order. Copies in other folders have the same digest."""

    num_files: int
    num_samples: int
    digest: str
    """SHA-256 over the name, size and number of samples of every file, in order, as 64 hexadecimal digits."""


def fingerprint(source: HasFiles) -> SourceFingerprint:
    """Computes the fingerprint of a source; takes about a microsecond per file."""
    digest, num_files = hashlib.sha256(), 0
    for file in source.files():
        digest.update(repr(tuple(file)).encode("utf-8", "surrogatepass"))
        num_files += 1
    return SourceFingerprint(num_files=num_files, num_samples=len(source), digest=digest.hexdigest())


def first_difference(own: Sequence[SourceFile], other: Sequence[SourceFile], name: str) -> str:
    """Describes the first difference between this process's files and those of process `name`."""
    ours, theirs = ({file.name: file for file in files} for files in (own, other))
    for file in other:
        if file.name not in ours:
            return f"{file.name} is missing"
    for file in own:
        if file.name not in theirs:
            return f"{file.name} is not on {name}"
    for file in own:
        found = theirs[file.name]
        if file.num_bytes != found.num_bytes:
            return f"{file.name} has {file.num_bytes} bytes, on {name} {found.num_bytes}"
        if file.num_samples != found.num_samples:
            return f"{file.name} has {file.num_samples} samples, on {name} {found.num_samples}"
    return "the same files come in another order"
