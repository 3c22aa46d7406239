"""Tests that hostile data files end in one printable line, within seconds and in bounded memory."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from beit3_ds.config import ConfigError
from beit3_ds.data.files.json_lines import iterate_json_lines
from beit3_ds.data.text.paragraphs import BrokenLines, read_paragraphs, whole_file
from tests.hostile.annotation_files import ANNOTATIONS
from tests.hostile.corpus import Figures, check_kind, show_figures
from tests.hostile.dense_files import DENSE
from tests.hostile.image_files import FOLDERS
from tests.hostile.tar_files import TARS
from tests.hostile.text_files import TEXTS

KINDS = {**ANNOTATIONS, **DENSE, **FOLDERS, **TARS, **TEXTS}
SAMPLE, ALL = 5, 100  # files per kind


@pytest.mark.parametrize("name", KINDS)
def test_a_sample_of_hostile_files(name: str, tmp_path: Path) -> None:
    check_kind(name, KINDS[name], tmp_path, range(SAMPLE))


@pytest.mark.slow
def test_thousands_of_hostile_files(tmp_path: Path) -> None:
    found: dict[str, Figures] = {}
    for name, kind in KINDS.items():
        found[name] = check_kind(name, kind, tmp_path, range(SAMPLE, ALL))
    print(show_figures(found))
    # catches changes that do nothing, and originals that no reader accepts; broken images are broken records
    refuses = {name: figures for name, figures in found.items() if not name.startswith("folder")}
    assert all(0 < figures.refused < figures.files for figures in refuses.values())


@pytest.mark.parametrize("blank", [b"\n", b"\r\n", b" \t\n", b"\r"])
def test_millions_of_blank_lines_take_no_time(blank: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"a dog\n" + blank * 5_000_000 + b"\na cat\nnul\0\n")
    broken = BrokenLines(1)
    assert [found.text for found in read_paragraphs(whole_file(str(path)), broken)] == ["a dog", "a cat"]
    lines = 1 + 5_000_000 * blank.count(b"\n") + 3  # catches skipped lines that are not counted
    assert broken.lines[0].startswith(f"{path}:{lines}: NUL")
    (tmp_path / "t.jsonl").write_bytes(blank * 5_000_000 + b'\n{"a": "x"}')
    found = list(iterate_json_lines(str(tmp_path / "t.jsonl"), {"a": str})) if blank != b"\r" else []
    assert found in ([(5_000_001 + 1, {"a": "x"})], [])


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_decompression_bomb_is_refused(compress: "type[bytes]", tmp_path: Path) -> None:
    path = tmp_path / ("t.txt.gz" if compress is gzip.compress else "t.txt.zst")
    path.write_bytes(compress(b"x" * 100_000_000))
    with pytest.raises(ConfigError, match="expands more than 100-fold"):
        list(read_paragraphs(whole_file(str(path)), BrokenLines(5)))


def test_a_line_of_json_beyond_the_limit_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"a": "x"}) + "\n" + json.dumps({"a": "x" * (9 << 20)}))
    with pytest.raises(ConfigError, match=r"t\.jsonl:2 is not JSON: .* exceed the limit"):
        list(iterate_json_lines(str(tmp_path / "t.jsonl"), {"a": str}))
