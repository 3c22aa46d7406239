"""Tests that file names with any bytes are printed as one line."""

import os

import pytest

from beit3_ds.printing import printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"plain \xc3\xa9.jpg", "plain é.jpg"),
        (b"two\nlines\t\x1b[31m", "two\\nlines\\t\\x1b[31m"),
        (b"caf\xe9", "caf\\udce9"),
        (b"\xc2\x85", "\\x85"),
    ],
)
def test_one_line_that_can_be_encoded(name: bytes, shown: str) -> None:
    printed = printable(os.fsdecode(name))
    assert printed == shown
    assert len(printed.splitlines()) == 1  # catches U+0085, a line break to Python
    printed.encode("utf-8")  # catches a surrogate that breaks every log
