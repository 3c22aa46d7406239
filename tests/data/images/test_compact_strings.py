"""Tests that compact strings return the strings that were stored."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.data.images.compact_strings import CompactStrings, StoredStrings


@given(st.lists(st.text(st.characters(exclude_categories=()))))
def test_strings_come_out_as_they_went_in(strings: list[str]) -> None:
    compact = CompactStrings(strings)
    assert [compact[i] for i in range(len(compact))] == strings  # half surrogate pairs, as in file names, included
    stored = StoredStrings(np.frombuffer(bytes(compact.text), dtype=np.uint8), np.asarray(compact.ends))
    assert [stored[i] for i in range(len(stored))] == strings


def test_indices_outside_are_refused() -> None:
    strings = CompactStrings(["a"])
    strings.append("b")
    for index in (-1, 2):  # catches -1, which would read the last end
        with pytest.raises(IndexError):
            strings[index]
