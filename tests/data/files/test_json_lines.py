"""Tests reading of JSON lines with required keys."""

from pathlib import Path

import pytest

from beit3_ds.config import ConfigError
from beit3_ds.data.files.json_lines import iterate_json_lines


def test_lines_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "x"}\n\n{"a": "y\\u2028", "b": 1}', encoding="utf-8")
    lines = list(iterate_json_lines(str(tmp_path / "a.jsonl"), {"a": str}))
    assert lines == [(1, {"a": "x"}), (3, {"a": "y\u2028", "b": 1})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": "x"}\n{"a": "x"', r"a\.jsonl:2 is not JSON"),
        (b'{"a": "x"}\n["a"]', r"a\.jsonl:2 is '\[\"a\"\]' and not an object"),
        (b'{"a": "x"}\n{"a": 1}', r"a\.jsonl:2 has a='1'; every line needs 'a' \(str\)"),
        (b'{"b": 1}', r"a\.jsonl:1 has no 'a'; every line needs"),
        (b'{"a": "x"}\n\xff', r"a\.jsonl:2 is not JSON: 'utf-8' codec"),
        (b"\x1f\x8b\x08\0", r"gzip data: unpack it first"),
    ],
)
def test_bad_lines_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list(iterate_json_lines(str(tmp_path / "a.jsonl"), {"a": str}))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl cannot be read"):
        list(iterate_json_lines(str(tmp_path / "none.jsonl"), {}))
