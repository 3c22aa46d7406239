"""Tests that the digest of a source's first samples changes with their numbers."""

import pytest

from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.order.prefix_digest import prefix_digest


@pytest.mark.parametrize("count", [0, 1, 2, 7, 300, 1000])
def test_whatever_shifts_numbers_changes_the_digest(count: int) -> None:
    class Samples:
        is_last_open = False

        def __init__(self, first: int) -> None:
            self.first = first

        def __len__(self) -> int:
            return 2000

        def files(self) -> list[SourceFile]:
            return [SourceFile("file", None, 1500), SourceFile("next", None, 500)]

        def identity(self, index: int) -> bytes:
            return str(index + self.first).encode()

    assert prefix_digest(Samples(0), count) == prefix_digest(Samples(0), count)
    assert (prefix_digest(Samples(0), count) == prefix_digest(Samples(1), count)) == (count == 0)
