"""Tests prepared texts: they give the sequences of unprepared texts, are shared and resumed, and go stale."""

import gzip
import json
import os
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from beit3_ds.config import ConfigError, DataConfig, SourceConfig, StreamConfig, TextTokenizerConfig
from beit3_ds.data.prepare.texts import WorkShare, prepare_texts
from beit3_ds.data.text import sequence_borders, token_files
from beit3_ds.data.text.sequences import TextSequences
from beit3_ds.data.text.token_files import find_token_pieces
from beit3_ds.tokenizers.text import TextTokenizer, train_text_tokenizer
from tests.data.conftest import BuildConfig

WORDS = ("red", "bird", "sits", "left", "of", "two", "green", "boats", "near", "water", "old", "trees", "in", "snow")
PIECE = 500  # bytes: some dozens of pieces
LENGTH = 16


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """Writes three files of three formats below one pattern, with paragraphs and sentences of any length."""
    rng = np.random.default_rng(3)
    words = np.array([*WORDS, *(f"{word}." for word in WORDS[:6])])
    paragraphs = [" ".join(rng.choice(words, rng.integers(1, 40))) for _ in range(200)]
    (tmp_path / "a.txt").write_text("".join(text + "\n" * rng.integers(1, 4) for text in paragraphs[:120]))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in paragraphs[120:160]))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("\n".join(paragraphs[160:]).encode()))
    return str(tmp_path / "[abc].*")


def data_config(train: str, folder: Path | None, validation: str | None = None, **changes: int) -> DataConfig:
    none = StreamConfig(train=(), samples_per_step=0)
    texts = StreamConfig(
        train=(SourceConfig(path=train),), validation=(SourceConfig(path=validation or train),), samples_per_step=1
    )
    prepared = None if folder is None else str(folder)
    return DataConfig(images=none, pairs=none, texts=texts, cache_dir=prepared, text_length=LENGTH, **changes)


def rows(sequences: TextSequences) -> list[list[int]]:
    return [sequences[i].tolist() for i in range(len(sequences))]


def test_another_separator_is_refused_and_prepared_again(tmp_path: Path, corpus: str, tokenizer: TextTokenizer) -> None:
    folder = tmp_path / "prepared"
    prepare_texts(data_config(corpus, folder), tokenizer, processes=1)
    with pytest.raises(ConfigError, match=r"a\.txt.*document_separator=True, the config has False.*prepare texts"):
        TextSequences([corpus], tokenizer, LENGTH, str(folder), document_separator=False)
    done = prepare_texts(data_config(corpus, folder, document_separator=False), tokenizer, processes=1)
    assert (done.pieces_written, done.pieces_kept) == (3, 0)  # catches tokens of the other kind that are kept
    prepared = TextSequences([corpus], tokenizer, LENGTH, str(folder), document_separator=False)
    assert rows(prepared) == rows(TextSequences([corpus], tokenizer, LENGTH, document_separator=False))
    assert done.num_tokens == sum(len(prepared[i]) - 2 for i in range(len(prepared)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "texts").iterdir())


@pytest.mark.parametrize("processes", [1, 2])
def test_prepared_and_unprepared_texts_are_the_same(
    tmp_path: Path, corpus: str, tokenizer: TextTokenizer, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence_borders, "_CHUNK_TOKENS", 100)  # catches a paragraph that is cut by the ids of another
    folder = tmp_path / "prepared"
    done = prepare_texts(data_config(corpus, folder), tokenizer, processes=processes, piece_bytes=PIECE)
    plain = TextSequences([corpus], tokenizer, LENGTH)
    prepared = TextSequences([corpus], tokenizer, LENGTH, cache_dir=str(folder))
    assert done.pieces_written > 20
    ends = sum(row.count(tokenizer.eos_id) for row in rows(plain))
    assert ends > len(plain)  # catches documents without separators
    # The last separator of a sequence is its own EOS.
    assert 0 <= done.num_tokens - sum(len(plain[i]) - 2 for i in range(len(plain))) <= len(plain)
    # catches tokens lost at the border of a piece, and sequences that end there
    assert rows(prepared) == rows(plain)
    assert [prepared.name(i) for i in range(len(prepared))] == [plain.name(i) for i in range(len(plain))]
    assert prepared[3].dtype == np.int64
    assert not [name for name in names(folder) if "tmp" in name or "lengths" in name]


def test_few_tokens_are_mapped_at_a_time(
    tmp_path: Path, corpus: str, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_texts(data_config(corpus, tmp_path), tokenizer, processes=1, piece_bytes=5000)
    pieces = find_token_pieces(tmp_path / "texts", corpus.replace("[abc].*", "a.txt"), tokenizer)
    monkeypatch.setattr(sequence_borders, "_CHUNK_TOKENS", 100)
    chunks = list(sequence_borders._chunks(pieces))
    longest = max(int(lengths.max()) for _, lengths in chunks)
    assert max(len(ids) for ids, _ in chunks) < 100 + longest < 300 < sum(len(ids) for ids, _ in chunks)
    assert [ids for chunk, _ in chunks for ids in chunk] == [ids for piece in pieces for ids in piece.tokens()]
    assert all(len(ids) == lengths.sum() for ids, lengths in chunks)


def test_opening_loads_nothing_and_copies_map_again(tmp_path: Path, corpus: str, tokenizer: TextTokenizer) -> None:
    folder = tmp_path / "prepared"
    prepare_texts(data_config(corpus, folder), tokenizer, processes=1)
    sequences = TextSequences([corpus], tokenizer, LENGTH, cache_dir=str(folder))
    pickled = pickle.dumps(sequences)
    # catches maps that are pickled as what they show: each worker would hold the corpus
    assert len(pickled) < 4000 < sum(path.stat().st_size for path in (folder / "texts").iterdir())
    assert rows(pickle.loads(pickled)) == rows(sequences)


def test_parts_share_the_work_in_any_order(tmp_path: Path, corpus: str, tokenizer: TextTokenizer) -> None:
    config = data_config(corpus, tmp_path / "parts")
    done = [prepare_texts(config, tokenizer, WorkShare(number=i, count=3), 1, PIECE) for i in (3, 1, 2)]
    assert all(part.pieces_written > 5 for part in done)
    assert [part.files_left > 0 for part in done] == [True, True, False]
    whole = prepare_texts(data_config(corpus, tmp_path / "whole"), tokenizer, processes=1, piece_bytes=PIECE)
    assert sum(part.num_tokens for part in done) == whole.num_tokens  # catches a piece done by two parts or none
    assert names(tmp_path / "parts") == names(tmp_path / "whole")
    assert rows(TextSequences([corpus], tokenizer, LENGTH, str(tmp_path / "parts"))) == rows(
        TextSequences([corpus], tokenizer, LENGTH)
    )


def test_an_interrupted_preparation_resumes(tmp_path: Path, corpus: str, tokenizer: TextTokenizer) -> None:
    config = data_config(corpus, tmp_path / "prepared")
    first = prepare_texts(config, tokenizer, processes=1, piece_bytes=PIECE)
    files = sorted((tmp_path / "prepared" / "texts").glob("*.tokens"))
    files[3].unlink()
    files[5].write_bytes(files[5].read_bytes()[:-5])
    with pytest.raises(ConfigError, match="beit3 prepare texts"):
        TextSequences([corpus], tokenizer, LENGTH, str(tmp_path / "prepared"))
    kept = {path: path.stat().st_mtime_ns for path in files if path not in (files[3], files[5])}
    again = prepare_texts(config, tokenizer, processes=1, piece_bytes=PIECE)
    assert (again.pieces_written, again.pieces_kept) == (2, first.pieces_written - 2)
    assert again.num_tokens == first.num_tokens
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # catches work done again


def test_stale_files_are_refused_by_name(tmp_path: Path, corpus: str, tokenizer: TextTokenizer) -> None:
    folder = tmp_path / "prepared"

    def open_prepared(tokenizer: TextTokenizer = tokenizer, length: int = LENGTH) -> TextSequences:
        return TextSequences([corpus], tokenizer, length, cache_dir=str(folder))

    with pytest.raises(ConfigError, match=r"has no tokens of .*a\.txt from byte 0"):
        open_prepared()
    prepare_texts(data_config(corpus, folder), tokenizer, processes=1, piece_bytes=PIECE)
    with pytest.raises(ConfigError, match=r"length-20\.borders is missing.*text_length=20"):
        open_prepared(length=20)
    other = train_text_tokenizer(
        TextTokenizerConfig(path=str(tmp_path / "other.spm"), vocab_size=24, character_coverage=1.0), WORDS * 9
    )
    with pytest.raises(ConfigError, match=r"a\.txt-.*\.tokens was made with another text tokenizer"):
        open_prepared(other)
    text = tmp_path / "a.txt"
    size = text.stat().st_size
    os.truncate(text, size - PIECE)
    with pytest.raises(ConfigError, match=rf"a\.txt-.*\.tokens was made when .*a\.txt had {size} bytes .*; now"):
        open_prepared()
    prepare_texts(data_config(corpus, folder), tokenizer, processes=1, piece_bytes=PIECE)
    # catches a token file left over from when the text was larger, and borders older than the tokens
    assert rows(open_prepared()) == rows(TextSequences([corpus], tokenizer, LENGTH))


def test_a_text_changed_in_place_is_refused_by_name(tmp_path: Path, corpus: str, tokenizer: TextTokenizer) -> None:
    config, text = data_config(corpus, tmp_path / "prepared"), tmp_path / "a.txt"
    prepare_texts(config, tokenizer, processes=1)
    text.write_text(
        "\n\n".join(reversed(text.read_text().split("\n\n")))
    )  # the same numbers of bytes, tokens and paragraphs
    os.utime(text, ns=(1, 1))
    with pytest.raises(ConfigError, match=r"made when .*a\.txt had .* mtime_ns .*; now they are .* and 1\. Run"):
        TextSequences([corpus], tokenizer, LENGTH, str(tmp_path / "prepared"))
    assert prepare_texts(config, tokenizer, processes=1).pieces_kept == 2  # those of b and c
    # catches borders of the old text
    assert rows(TextSequences([corpus], tokenizer, LENGTH, str(tmp_path / "prepared"))) == rows(
        TextSequences([corpus], tokenizer, LENGTH)
    )


def test_files_of_another_version_are_refused_and_rewritten(
    tmp_path: Path, corpus: str, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = data_config(corpus, tmp_path / "prepared"), tmp_path / "prepared" / "texts"
    with monkeypatch.context() as patch:
        patch.setattr(token_files, "_VERSION", token_files._VERSION - 1)
        prepare_texts(config, tokenizer, processes=1)
    with pytest.raises(ConfigError, match=r"\.tokens cannot be read: it was not written by version.*prepare texts"):
        TextSequences([corpus], tokenizer, LENGTH, str(tmp_path / "prepared"))
    next(folder.glob("c.*.borders")).write_bytes(b"damaged")
    assert prepare_texts(config, tokenizer, processes=1).pieces_kept == 0
    assert rows(TextSequences([corpus], tokenizer, LENGTH, str(tmp_path / "prepared"))) == rows(
        TextSequences([corpus], tokenizer, LENGTH)
    )


def test_names_that_are_not_utf8(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text("red bird\n")
    config = data_config(str(tmp_path / "*.txt"), tmp_path / "prepared")
    assert prepare_texts(config, tokenizer, processes=1).pieces_written == 1
    assert len(TextSequences([str(tmp_path / "*.txt")], tokenizer, LENGTH, str(tmp_path / "prepared"))) == 1


def test_broken_lines_are_counted_over_all_pieces(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path, folder = tmp_path / "bad.txt", tmp_path / "prepared"
    path.write_bytes(b"\n".join([b"red bird", b"caf\xe9", b"two boats"] * 40))
    with pytest.raises(ConfigError, match=r"max_broken_records=39(?s:.*)bad\.txt:2: not UTF-8"):
        prepare_texts(data_config(str(path), folder, max_broken_records=39), tokenizer, processes=1, piece_bytes=PIECE)
    done = prepare_texts(
        data_config(str(path), folder, max_broken_records=40), tokenizer, processes=1, piece_bytes=PIECE
    )
    assert len(done.broken) == 40
    assert sorted(int(line.split(":")[1]) for line in done.broken) == list(range(2, 121, 3))
    prepared = TextSequences([str(path)], tokenizer, LENGTH, str(folder), max_broken_lines=40)
    plain = TextSequences([str(path)], tokenizer, LENGTH, max_broken_lines=40)
    assert rows(prepared) == rows(plain)
    assert sorted(prepared.broken) == sorted(plain.broken) == sorted(done.broken)
    with pytest.raises(ConfigError, match="max_broken_records=39"):
        TextSequences([str(path)], tokenizer, LENGTH, str(folder), max_broken_lines=39)


def test_an_error_in_a_process_reaches_the_user(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    (tmp_path / "good.txt").write_text("red bird\n")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"two green boats\n" * 99)[:-9])
    config = data_config(str(tmp_path / "*.txt*"), tmp_path / "prepared")
    with pytest.raises(ConfigError, match=r"cut\.txt\.gz cannot be read"):
        prepare_texts(config, tokenizer, processes=2)
    assert all("tmp" not in name for name in names(tmp_path / "prepared"))


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/" + "9" * 5000])
def test_a_part_is_i_of_n(text: str) -> None:
    with pytest.raises(ConfigError, match=r"1/8"):
        WorkShare.parse(text)


def test_a_folder_must_be_named(corpus: str, tokenizer: TextTokenizer) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache_dir is not set"):
        prepare_texts(data_config(corpus, None), tokenizer)


def test_opening_many_prepared_texts_lists_no_folder_and_keeps_none_open(
    tmp_path: Path, tokenizer: TextTokenizer, build_config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(60):
        (tmp_path / f"{number:02d}.txt").write_text("red bird sits left of two green boats. " * 3)
    files = {"texts": str(tmp_path / "*.txt")}
    data = build_config(files=files, data={"cache_dir": str(tmp_path)}).data
    prepare_texts(data, tokenizer, processes=1)
    listed: list[object] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path=".": (listed.append(str(path)), scandir(path))[1])
    before = len(scandir_names("/proc/self/fd", scandir))
    sequences = TextSequences([str(tmp_path / "*.txt")], tokenizer, data.text_length, str(tmp_path))
    copy = pickle.loads(pickle.dumps(sequences))
    for one in (sequences, copy):
        assert [len(one[i]) for i in range(len(one))]
    # catches one listing of all token files per text, which takes minutes for ten thousand of them
    assert not [path for path in listed if path.endswith("texts")]
    # catches maps that keep a descriptor each: 1,000 pieces, 64 GB of text, would exhaust the usual limit
    assert len(scandir_names("/proc/self/fd", scandir)) <= before + 2


def scandir_names(folder: str, scandir: Callable[[str], Iterable[os.DirEntry[str]]]) -> list[str]:
    return [entry.name for entry in scandir(folder)]
