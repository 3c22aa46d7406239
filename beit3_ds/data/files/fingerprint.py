"""Computes fingerprints of data sources; ranks compare them to detect different files."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, TypedDict


class SourceFile(NamedTuple):
    """Describes one file of a data source; ranks compare these descriptions."""

    name: str
    """Name of the file. Excludes the folder given in the config, because hosts may use different folders."""
    num_bytes: int | None
    """Size of the file in bytes. None if the size was not looked up, as for most images in a large folder."""
    num_samples: int
    """Number of samples in the file."""


class HasFiles(Protocol):
    """Interface of a data source that can list its files."""

    def __len__(self) -> int:
        """Returns the number of samples, including broken samples."""

    def files(self) -> Iterable[SourceFile]:
        """Returns a description of each source file, in the order of the samples."""


class SourceFingerprint(TypedDict):
    """Identifies the samples of a data source and their order; copies of the files have equal fingerprints."""

    num_files: int
    num_samples: int
    digest: str
    """SHA-256 digest over the name, size and number of samples of every file, as 64 hexadecimal digits."""


def fingerprint(source: HasFiles) -> SourceFingerprint:
    """Computes the fingerprint of a data source from its list of files; takes about a microsecond per file."""
    digest, num_files = hashlib.sha256(), 0
    for file in source.files():
        digest.update(repr(tuple(file)).encode("utf-8", "surrogatepass"))
        num_files += 1
    return SourceFingerprint(num_files=num_files, num_samples=len(source), digest=digest.hexdigest())


def first_difference(own: Sequence[SourceFile], other: Sequence[SourceFile], name: str) -> str:
    """Describes the first difference between two lists of files, for messages.

    Args:
        own: files that this process found.
        other: files that another process found.
        name: name of the other process, used in the description.
    """
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
