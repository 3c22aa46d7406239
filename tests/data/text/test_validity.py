"""Tests that binary data that decode as text are refused, but not text with a single control character."""

import pytest

from beit3_ds.data.text.validity import check_is_text


@pytest.mark.parametrize("text", ["", "plain", "tab\tand\x0c", "one stray \x13 control", "\x85", "日本語。", "🏔"])
def test_text_is_accepted(text: str) -> None:
    check_is_text(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\0b", "NUL"),
        ("\x01\x02abc", "2 of 5 characters are control characters"),
        ("x\uffff", "1 of 2"),
        ("a\ud800", "half a surrogate pair at character 1"),
    ],
)
def test_other_data_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_is_text(text)
