"""Tests paragraphs of text files: equal in every format, none lost where files are cut, broken lines counted."""

import bz2
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
from beit3_ds.data.text import json_values, paragraphs
from beit3_ds.data.text.paragraphs import BrokenLines, TextPiece, cut_into_pieces, read_paragraphs, whole_file

PARAGRAPHS = ["One.", "Zwei Äpfel.", "三 words", "four"]
PLAIN = "\ufeffOne.\r\n\n Zwei Äpfel. \n三 words\n \t\nfour".encode()
JSONL = "\n".join(
    [json.dumps({"text": "One.\nZwei Äpfel.\n\n", "id": 1}), "", json.dumps({"text": " 三 words"}), '{"text": "four"}']
).encode()


def read(path: Path, budget: int = 0) -> list[str]:
    return [paragraph.text for paragraph in read_paragraphs(whole_file(str(path)), BrokenLines(budget))]


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
    data=st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r\n", b"\r", b" ", b"def", b"\n\n", b"\xff"])).map(b"".join),
    size=st.integers(1, 9),
)
def test_pieces_give_each_line_once(tmp_path_factory: pytest.TempPathFactory, data: bytes, size: int) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.txt"
    path.write_bytes(data)
    pieces = cut_into_pieces(str(path), size)
    assert [piece.start for piece in pieces[1:]] == [piece.stop for piece in pieces[:-1]]
    # catches a line read twice or by nobody, above all one that starts exactly where a piece does
    whole = list(read_paragraphs(whole_file(str(path)), BrokenLines(99)))
    # also catches an end of a document that is not seen because the blank line is in the next piece
    assert [paragraph for piece in pieces for paragraph in read_paragraphs(piece, BrokenLines(99))] == whole


def test_compressed_files_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(PLAIN))
    assert cut_into_pieces(str(path), 1) == [TextPiece(str(path), 0, path.stat().st_size)]


def test_broken_lines_are_named_with_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paragraphs, "_MAX_LINE_BYTES", 40)
    lines = {
        b'{"text": "fine"}': None,
        b'{"text": "caf\xe9"}': "not UTF-8: .* at byte 13",
        b"{": "not JSON",
        b"[" * 39: "not JSON",
        b'{"txt": "a"}': "no JSON object with a string under 'text'",
        b'["text"]': "no JSON object",
        b'{"text": 3}': "no JSON object",
        rb'{"text": "a\ud800"}': "half a surrogate pair at character 1",
        rb'{"text": "a\u0000b"}': "NUL",
        b'{"text": "' + b"long " * 50 + b'"}': "longer than",
        b'{"text": "last"}': None,
    }
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    expected = [(number, reason) for number, reason in enumerate(lines.values(), 1) if reason]
    for size in (10_000, 30):  # whole, and in pieces: line numbers count from the start of the file
        broken = BrokenLines(len(expected))
        pieces = cut_into_pieces(str(path), size)
        assert [paragraph.text for piece in pieces for paragraph in read_paragraphs(piece, broken)] == ["fine", "last"]
        assert len(broken.lines) == len(expected)
        for line, (number, reason) in zip(broken.lines, expected, strict=True):
            assert line.startswith(f"{path}:{number}: ")
            with pytest.raises(AssertionError, match=reason):
                raise AssertionError(line)
    with pytest.raises(ConfigError, match=r"9 lines .*max_broken_records=8(?s:.*)a.jsonl:2: not UTF-8"):
        read(path, len(expected) - 1)


DOCUMENTS = [["One.", "Zwei."], ["three"], ["four"]]
RECORDS = [{"text": "\n".join(document)} for document in DOCUMENTS]
PLAIN_DOCUMENTS = "\n\n".join("\n".join(document) for document in DOCUMENTS)
LINES = "\n".join(map(json.dumps, RECORDS))


def _documents(path: Path) -> list[list[str]]:
    documents: list[list[str]] = [[]]
    for paragraph in read_paragraphs(whole_file(str(path)), BrokenLines(0)):
        documents[-1].append(paragraph.text)
        if paragraph.ends_document:
            documents.append([])
    assert documents.pop() == []
    return documents


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", PLAIN_DOCUMENTS),
        ("a", PLAIN_DOCUMENTS + "\n \n\n"),
        ("A.TXT", PLAIN_DOCUMENTS.replace("\n", "\r\n")),
        ("mac.txt", PLAIN_DOCUMENTS.replace("\n", "\r")),
        ("a.jsonl", LINES),
        ("a.JSONL", "\n" + LINES.replace("\n", "\r\n") + "\n"),
        ("a.ndjson", LINES),
        ("a.jsonlines", "\ufeff" + LINES),
        ("a.json", LINES),
        ("one-line.json", json.dumps(RECORDS)),
        ("joined.json", "".join(map(json.dumps, RECORDS))),  # one line, but not one value
        ("list.json", json.dumps(RECORDS, indent=2)),
        ("list.jsonl", "\ufeff \n" + json.dumps(RECORDS, indent=1)),
        ("objects.json", "\n".join(json.dumps(record, indent=1) for record in RECORDS)),
        ("lists.json", json.dumps(RECORDS[:2]) + "\n" + json.dumps(RECORDS[2:])),
    ],
)
@pytest.mark.parametrize(
    ("ending", "compress"),
    [("", bytes), (".gz", gzip.compress), (".GZ", gzip.compress), (".zst", zstandard.compress)],
)
def test_every_name_is_read_as_what_it_holds(
    tmp_path: Path, name: str, text: str, ending: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / (name + ending)
    path.write_bytes(compress(text.encode()))
    assert _documents(path) == DOCUMENTS  # catches JSON read as plain text, braces included
    pieces = cut_into_pieces(str(path), 30)
    whole = list(read_paragraphs(whole_file(str(path)), BrokenLines(0)))
    assert [paragraph for piece in pieces for paragraph in read_paragraphs(piece, BrokenLines(0))] == whole


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"id,text\n1,a\n", "is a table: write the column"),
        ("a.tsv.gz", gzip.compress(b"a\tb", mtime=0), "is a table"),
        ("a.parquet", b"PAR1", "is a binary table"),
        ("a.tar.gz", gzip.compress(b"a", mtime=0), "is an archive"),
        ("a.bz2", b"BZh", "use gzip or Zstandard"),
        ("a.html", b"<p>a</p>", "extract its text"),
        ("a.jpg", b"", "is an image"),
        ("a.txt", gzip.compress(b"a", mtime=0), "holds gzip data, not UTF-8 text"),
        ("a.zst", gzip.compress(b"a", mtime=0), "cannot be read"),
        ("twice.txt.gz", gzip.compress(gzip.compress(b"a", mtime=0), mtime=0), "holds gzip data"),
        ("a.txt", "a text".encode("utf-16"), "holds UTF-16 text.*iconv"),
        ("a.txt", "a text".encode("utf-32"), "holds UTF-32 text.*iconv"),
        ("a.jsonl", b"\xff\xfe" + LINES.encode("utf-16-le"), "holds UTF-16 text"),
        ("a.txt", LINES.encode(), "Name it \\*.jsonl"),
        ("list.txt", json.dumps(RECORDS, indent=1).encode(), "Name it \\*.jsonl"),
        ("long.txt", json.dumps({"id": 1, "text": "a " * 99_999}).encode(), "Name it \\*.jsonl"),
        ("a.txt", bz2.compress(b"a"), "holds bzip2 data"),
        ("cut.json", json.dumps(RECORDS, indent=1).encode()[:-3], "after value 2: not JSON"),
        ("open.json", json.dumps(RECORDS).encode()[:-1], "after value 3: truncated within a list"),
        ("bad.json", b'[{"text": "a"}, nothing]', "after value 1: not JSON"),
        ("latin.json", b'[{"text": "caf\xe9"}]', "after value 0.*utf-8"),
    ],
)
def test_what_is_no_text_is_refused_with_what_to_do(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=rf"{name} .*{message}"):
        read(tmp_path / name, 99)  # catches a budget of broken lines that hides a whole file


@pytest.mark.parametrize("text", ["{braces} in a text", '{"a": 1} is an object', "BZh is a name", "[1] a note"])
def test_plain_text_may_begin_like_another_format(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.txt") == [text]


def test_what_cannot_be_text_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    lines = [
        "fine",
        "a\0b",
        "\x01\x02\x03 binary",
        "one\x13 stray control in a long line is kept",
        "x\uffff",
        "\x85 NEL",
    ]
    path.write_text("\n".join(lines), newline="\n")
    broken = BrokenLines(9)
    kept = [paragraph.text for paragraph in read_paragraphs(whole_file(str(path)), broken)]
    assert kept == ["fine", lines[3], "NEL"]
    assert [line.removeprefix(f"{path}:")[:6] for line in broken.lines] == ["2: NUL", "3: 3 o", "5: 1 o"]
    path.write_text("no mark at the beginning", encoding="utf-16-le")
    with pytest.raises(ConfigError, match="NUL"):
        read(path)


def test_a_broken_value_of_a_list_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"txt": "b"}, "c", None, 3, {"text": "d"}], indent=1))
    broken = BrokenLines(9)
    texts = [paragraph.text for paragraph in read_paragraphs(whole_file(str(tmp_path / "a.json")), broken)]
    assert texts == ["a", "d"]
    assert [line.split(":")[1] for line in broken.lines] == ["2", "3", "4", "5"]


def test_a_first_line_that_is_too_long_is_broken_despite_its_byte_order_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a mark that is removed before the length is checked: the cut line would count as a paragraph."""
    monkeypatch.setattr(paragraphs, "_MAX_LINE_BYTES", 40)
    path, broken = tmp_path / "a.txt", BrokenLines(1)
    path.write_bytes(b"\xef\xbb\xbf" + b"word " * 20 + b"\nsecond")
    assert [paragraph.text for paragraph in read_paragraphs(whole_file(str(path)), broken)] == ["second"]
    (line,) = broken.lines
    assert line.endswith("a.txt:1: longer than 0 MiB")


def test_long_lists_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_values, "_CHUNK", 7)
    (tmp_path / "a.json").write_text(json.dumps(RECORDS * 9 + [{"text": "x" * 300, "n": 123456}], indent=1))
    assert _documents(tmp_path / "a.json") == [*DOCUMENTS * 9, ["x" * 300]]
    monkeypatch.setattr(paragraphs, "_MAX_LINE_BYTES", 100)
    with pytest.raises(ConfigError, match="a value of more than 100 characters"):
        read(tmp_path / "a.json")


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
    monkeypatch.setattr(paragraphs, "_MAX_LINE_BYTES", 1 << 16)
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


def test_blank_lines_are_passed_over_at_every_cut(tmp_path: Path) -> None:
    """Catches lines that a part skips although they belong to the next part, and documents that are joined."""
    path = tmp_path / "a.txt"
    path.write_text("\n" * 1000 + "one\n" + "\n" * 500 + "two\nthree\n" + "\n" * 300)
    whole = list(read_paragraphs(whole_file(str(path)), BrokenLines(0)))
    assert [(paragraph.text, paragraph.ends_document) for paragraph in whole] == [
        *(("one", True), ("two", False), ("three", True))
    ]
    for size in (7, 100, 501, 999, 1004):
        pieces = cut_into_pieces(str(path), size)
        assert [paragraph for piece in pieces for paragraph in read_paragraphs(piece, BrokenLines(0))] == whole
