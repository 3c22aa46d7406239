"""Tests that formats of text files are recognised by name and first bytes, also through compression."""

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from beit3_ds.config import ConfigError
from beit3_ds.data.text.formats import find_text_format, open_decompressed


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("a", b"plain", "plain"),
        ("a.txt", b"", "plain"),
        ("a.jsonl", b'{"text": "a"}\n', "json_lines"),
        ("a.jsonl", b' [{"text": "a"}]', "json_values"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}', "json_lines"),
        ("a.json", b'{\n"text": "a"\n}', "json_values"),
        ("A.NDJSON", b"{", "json_lines"),
    ],
)
@pytest.mark.parametrize(
    ("ending", "compression", "compress"),
    [("", "", bytes), (".GZ", "gzip", gzip.compress), (".zst", "zstandard", zstandard.compress)],
)
def test_name_and_content_decide(
    tmp_path: Path,
    name: str,
    data: bytes,
    kind: str,
    ending: str,
    compression: str,
    compress: Callable[[bytes], bytes],
) -> None:
    path = tmp_path / (name + ending)
    path.write_bytes(compress(data))
    found = find_text_format(str(path))
    assert found == (kind, compression)
    assert found.is_read_whole == (bool(ending) or kind == "json_values")
    with open_decompressed(str(path), found.compression) as file:
        assert file.read() == data


def test_a_folder_is_refused_with_a_pattern(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder\. Name its files, for example .*\*\.txt"):
        find_text_format(str(tmp_path))


def test_all_frames_are_read_and_a_truncated_one_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.zst"
    frames = zstandard.compress(b"one ") + zstandard.compress(b"two" * 9999)
    path.write_bytes(frames)
    with open_decompressed(str(path), "zstandard") as file:
        assert io.BytesIO(file.read()).getvalue() == b"one " + b"two" * 9999
    path.write_bytes(frames[:-3])
    with open_decompressed(str(path), "zstandard") as file, pytest.raises(EOFError, match="within a Zstandard frame"):
        file.read()
