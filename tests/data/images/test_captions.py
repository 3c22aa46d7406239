"""Tests that valid captions are decoded and invalid ones refused."""

import json

import pytest

from beit3_ds.data.images.captions import MAX_CAPTION_BYTES, MAX_JSON_BYTES, decode_caption, decode_json_caption


@pytest.mark.parametrize(
    ("data", "caption"),
    [(b" a cat \r\n", "a cat"), ("\ufeffzwei Vögel".encode(), "zwei Vögel"), (b"two\nlines", "two\nlines")],
)
def test_text(data: bytes, caption: str) -> None:
    assert decode_caption(data) == caption


@pytest.mark.parametrize(
    "data", [b"", b" \n\t", "café".encode("latin-1"), b"a\0b", b"x" * (MAX_CAPTION_BYTES + 1), b"\xff\xfea\0"]
)
def test_what_is_no_caption_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"caption|utf-8"):
        decode_caption(data)


def test_json() -> None:
    content = {"caption": " ein Löwe ", "url": "u", "key": "000000001", "status": "success"}
    assert decode_json_caption(json.dumps(content).encode()) == "ein Löwe"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"caption": null}',
        b'{"caption": 3}',
        b'{"caption": " "}',
        b'{"caption": "\\ud800"}',  # the tokenizer would raise on half a pair
        b'{"caption": "a\\u0000b"}',
        b"[" * 100_000,  # catches a RecursionError let through
        b'{"caption": "%s"}' % (b"x" * (MAX_CAPTION_BYTES + 1)),
        b" " * (MAX_JSON_BYTES + 1),
        b"\xff\xff",
    ],
)
def test_json_without_a_caption_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_json_caption(data)
