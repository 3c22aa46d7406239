"""Reading text files: every format gives the same paragraphs, cuts lose no line, broken lines are counted."""

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.config import ConfigError
from beit3_ds.data import text_files
from beit3_ds.data.text_files import BrokenLines, TextPiece, cut_into_pieces, read_paragraphs, whole_file

PARAGRAPHS = ["One.", "Zwei Äpfel.", "三 words", "four"]
PLAIN = "\ufeffOne.\r\n\n Zwei Äpfel. \n三 words\n \t\nfour".encode()
JSONL = "\n".join(
    [json.dumps({"text": "One.\nZwei Äpfel.\n\n", "id": 1}), "", json.dumps({"text": " 三 words"}), '{"text": "four"}']
).encode()


def read(path: Path, budget: int = 0) -> list[str]:
    return list(read_paragraphs(whole_file(str(path)), BrokenLines(budget)))


def _two_frames(data: bytes) -> bytes:
    half = len(data) // 2
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize(
    ("ending", "compress"),
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".gz", lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:])),
        (".zst", zstandard.compress),
        (".zst", _two_frames),
    ],
)
def test_every_format_gives_the_same_paragraphs(
    tmp_path: Path, name: str, ending: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / (name + ending)
    path.write_bytes(compress(JSONL if "jsonl" in name else PLAIN))
    assert read(path) == PARAGRAPHS  # catches a kept mark or blank, and a reader that stops after the first frame


@settings(max_examples=100, deadline=None)
@given(
    data=st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r\n", b" ", b"def"])).map(b"".join), size=st.integers(1, 9)
)
def test_pieces_give_each_line_once(tmp_path_factory: pytest.TempPathFactory, data: bytes, size: int) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.txt"
    path.write_bytes(data)
    pieces = cut_into_pieces(str(path), size)
    assert [piece.start for piece in pieces[1:]] == [piece.stop for piece in pieces[:-1]]
    # catches a line read twice or by nobody, above all one that starts exactly where a piece does
    assert [text for piece in pieces for text in read_paragraphs(piece, BrokenLines(0))] == read(path)


def test_compressed_files_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(PLAIN))
    assert cut_into_pieces(str(path), 1) == [TextPiece(str(path), 0, path.stat().st_size)]


def test_broken_lines_are_named_with_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "_MAX_LINE_BYTES", 40)
    lines = {
        b'{"text": "fine"}': None,
        b'{"text": "caf\xe9"}': "not UTF-8: .* at byte 13",
        b"{": "not JSON",
        b"[" * 39: "not JSON",
        b'{"txt": "a"}': "no JSON object with a string under 'text'",
        b'["text"]': "no JSON object",
        b'{"text": 3}': "no JSON object",
        rb'{"text": "a\ud800"}': "half a surrogate pair at character 1",
        b'{"text": "' + b"long " * 50 + b'"}': "longer than",
        b'{"text": "last"}': None,
    }
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    expected = [(number, reason) for number, reason in enumerate(lines.values(), 1) if reason]
    for size in (10_000, 30):  # whole, and in pieces: line numbers count from the start of the file
        broken = BrokenLines(len(expected))
        pieces = cut_into_pieces(str(path), size)
        assert [text for piece in pieces for text in read_paragraphs(piece, broken)] == ["fine", "last"]
        assert len(broken.lines) == len(expected)
        for line, (number, reason) in zip(broken.lines, expected, strict=True):
            assert line.startswith(f"{path}:{number}: ")
            with pytest.raises(AssertionError, match=reason):
                raise AssertionError(line)
    with pytest.raises(ConfigError, match=r"8 lines .*max_broken_records=7(?s:.*)a.jsonl:2: not UTF-8"):
        read(path, len(expected) - 1)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("cut.txt.gz", gzip.compress(PLAIN, mtime=0)[:-9]),
        ("cut.txt.zst", zstandard.compress(PLAIN)[:-3]),  # zstandard's own reader takes this for the end
        ("wrong.txt.gz", PLAIN),
        ("wrong.txt.zst", PLAIN),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=f"{name} cannot be read"):
        read(tmp_path / name)


@pytest.mark.parametrize("compress", [None, gzip.compress, zstandard.compress], ids=["", ".gz", ".zst"])
def test_memory_is_bounded_by_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: Callable[[bytes], bytes] | None
) -> None:
    monkeypatch.setattr(text_files, "_MAX_LINE_BYTES", 1 << 16)
    letters = np.random.default_rng(0).integers(97, 123, 12 << 20, dtype=np.uint8).tobytes()
    data = letters + b"\n" + b"short line\n" * 1000
    path = tmp_path / {None: "a.txt", gzip.compress: "a.txt.gz", zstandard.compress: "a.txt.zst"}[compress]
    path.write_bytes(compress(data) if compress else data)
    del data, letters
    tracemalloc.start()
    broken = BrokenLines(1)
    assert sum(1 for _ in read_paragraphs(whole_file(str(path)), broken)) == 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "longer than" in broken.lines[0]
    assert peak < 8 << 20  # catches a file, or an endless line, that is read at once
