"""Tests that JSON from untrusted sources is parsed strictly and in bounded time."""

import time
from typing import Any

import pytest

from beit3_ds.untrusted_json import check_count, check_list, check_object, check_text, parse_untrusted_json


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"a": {"b": NaN}}', "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b"[1e999]", "beyond the largest float"),
        (b"[9223372036854775808]", "beyond 64 bits"),
        (b"1" * 100_000, "beyond 64 bits"),
        (b"[" * 40_000, "nested too deep"),
        (b'{"a":' * 40_000, "nested too deep"),
        (b"[" + b"[]," * 2_000_000 + b"[]]", "too many lists or objects"),
        (b"\xff\xfe\xfa", "UTF-8"),
        (b'{"a": 1', "Expecting"),
        (b" " * (1 << 23) + b"1", "exceed the limit"),
    ],
)
def test_what_is_refused(text: bytes, reason: str) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match=reason):
        parse_untrusted_json(text)
    assert time.monotonic() - began < 1


def test_what_is_read() -> None:
    assert parse_untrusted_json(b'{"a": [1, -2.5, true, null, "x"]}') == {"a": [1, -2.5, True, None, "x"]}
    assert parse_untrusted_json(str([[1, 2, 3, 4, 5]] * 200_000))  # pieces of a checkpoint
    assert parse_untrusted_json("[NaN]", accepts_constants=True)


@pytest.mark.parametrize("value", [True, -1, 1.0, "1", None, [], {}])
def test_counts(value: Any) -> None:
    with pytest.raises(ValueError, match="no integer from 0 on"):
        check_count(value)
    assert check_count(2**60) == 2**60


def test_other_kinds() -> None:
    for check, value in ((check_text, 3), (check_object, []), (check_list, {})):
        with pytest.raises(ValueError, match="is no "):
            check(value)
    with pytest.raises(ValueError, match="no list of 2 values"):
        check_list([1], 2)
