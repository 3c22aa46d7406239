"""Tests failures of the file system.

A short failure is retried, and a lasting one ends the run. Neither counts as a broken record.
"""

import builtins
import errno
import gzip
import io
import json
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.cli import main as cli
from beit3_ds.config import ConfigError, DataConfig, SourceConfig, StreamConfig
from beit3_ds.data.files import reading as file_reading
from beit3_ds.data.files.reading import open_for_reading, read_with_retries
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.images.annotations import read_coco_captions, read_conceptual_captions
from beit3_ds.data.images.folder import ImageFolder
from beit3_ds.data.images.shards import TarShards
from beit3_ds.data.prepare.texts import prepare_texts
from beit3_ds.data.text.paragraphs import BrokenLines, read_paragraphs, whole_file
from beit3_ds.data.text.sequences import TextSequences
from beit3_ds.storage_error import StorageError
from beit3_ds.tokenizers.text import TextTokenizer
from tests.data.conftest import WriteTar
from tests.run_config import quickstart_mapping

FaultyReads = Callable[[str, int, int], None]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_reading, "_PAUSES", (0.0, 0.0, 0.0))


@pytest.fixture
def faulty_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyReads]:
    """Provides a function that makes the next `count` reads below a path fail with an error number."""
    faults: dict[str, list[int]] = {}

    def fail(path: object) -> None:
        for prefix, numbers in faults.items():
            if numbers and isinstance(path, str) and path.startswith(prefix):
                number = numbers.pop()
                raise OSError(number, os.strerror(number), path)

    class File(io.FileIO):
        def readinto(self, buffer: Any) -> int | None:
            fail(self.name)
            return super().readinto(buffer)

    def faulty_open(file: Any, mode: str = "r", buffering: int = -1, **options: Any) -> Any:
        if buffering == 0 and mode == "rb" and isinstance(file, str):
            return File(file)
        return own_open(file, mode, buffering, **options)

    def faulty_pread(descriptor: int, size: int, offset: int) -> bytes:
        fail(os.readlink(f"/proc/self/fd/{descriptor}"))
        return own_pread(descriptor, size, offset)

    def faulty_os_open(path: Any, *arguments: Any, **options: Any) -> int:
        fail(path)
        return own_os_open(path, *arguments, **options)

    own_open, own_pread, own_os_open = builtins.open, os.pread, os.open
    monkeypatch.setattr(builtins, "open", faulty_open)
    monkeypatch.setattr(os, "pread", faulty_pread)
    monkeypatch.setattr(os, "open", faulty_os_open)

    def schedule(path: str, count: int, number: int) -> None:
        faults[path] = [number] * count

    yield schedule
    monkeypatch.undo()


TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOTCONN, errno.EMFILE)


@pytest.mark.parametrize("number", TRANSIENT, ids=errno.errorcode.get)
def test_a_short_failure_is_retried_and_a_lasting_one_ends_the_run(
    tmp_path: Path,
    write_tar: WriteTar,
    png: bytes,
    tokenizer: TextTokenizer,
    faulty_reads: FaultyReads,
    number: int,
) -> None:
    (tmp_path / "folder").mkdir()
    for name, data in (("a.png", png), ("a.txt", b"in a folder")):
        (tmp_path / "folder" / name).write_bytes(data)
    tar = TarShards([write_tar(tmp_path / "s.tar", {"a.png": png, "a.txt": b"in a tar"})])
    folder = ImageFolder(str(tmp_path / "folder"))
    captions = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "in a list"}]}
    annotations, rows, text = (str(tmp_path / name) for name in ("c.json", "c.tsv", "t.jsonl"))
    Path(annotations).write_text(json.dumps(captions), encoding="utf-8-sig")
    Path(rows).write_text("a caption\thttp://x/0.png\n")
    Path(text).write_text('{"text": "in a text"}')
    (tmp_path / "folder/0.png").write_bytes(png)
    none = StreamConfig(train=(), samples_per_step=0)
    texts = StreamConfig(train=(SourceConfig(path=text),), samples_per_step=1)
    prepared = str(tmp_path / "prepared")
    prepare_texts(
        DataConfig(images=none, pairs=none, texts=texts, cache_dir=prepared, text_length=16), tokenizer, processes=1
    )
    sequences = TextSequences([text], tokenizer, 16, prepared)
    coco = read_coco_captions(annotations, folder.path)
    reads: list[tuple[str, Callable[[], object]]] = [
        (tar.paths[0], lambda: tar.image(0)),
        (tar.paths[0], lambda: tar.caption(0)),
        (tar.paths[0], lambda: TarShards(tar.paths)),
        (folder.path, lambda: folder.image(0)),
        (folder.path, lambda: folder.caption(0)),
        (folder.path, lambda: coco.image(0)),
        (annotations, lambda: read_coco_captions(annotations, folder.path)),
        (rows, lambda: read_conceptual_captions(rows, folder.path, "caption_url")),
        (f"{prepared}/texts/t.jsonl", lambda: pickle.loads(pickle.dumps(sequences))[0]),
        (text, lambda: list(read_paragraphs(whole_file(text), BrokenLines(0)))),
    ]
    for path, read in reads:
        faulty_reads(path, 1, number)
        read()  # catches an error that is counted as a broken record at once
        faulty_reads(path, 1000, number)
        # catches a failing file system that is counted, and a message that does not say where it fails
        with pytest.raises(StorageError, match=rf"{socket.gethostname()} cannot read {path}.*{os.strerror(number)}"):
            read()
        faulty_reads(path, 0, number)


def test_a_command_on_a_failing_file_system_ends_with_one_line(
    tmp_path: Path,
    write_tar: WriteTar,
    png: bytes,
    faulty_reads: FaultyReads,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = quickstart_mapping()
    tar = write_tar(tmp_path / "s.tar", {f"{i}.png": png for i in range(9)})
    content["beit3_ds"]["data"]["images"]["train"] = [tar]
    (tmp_path / "run.json").write_text(json.dumps(content))
    faulty_reads(tar, 100_000, errno.EIO)
    # 1: nothing needs to be changed before the same command can work, unlike 2
    assert cli.main(["prepare", "stats", str(tmp_path / "run.json")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{socket.gethostname()} cannot read {tar}" in error


def test_a_forbidden_image_is_a_broken_record(tmp_path: Path, png: bytes, faulty_reads: FaultyReads) -> None:
    (tmp_path / "a.png").write_bytes(png)
    folder = ImageFolder(str(tmp_path))
    faulty_reads(str(tmp_path / "a.png"), 1, errno.EACCES)
    with pytest.raises(BrokenRecordError, match="Permission denied"):
        folder.image(0)  # catches one file's permissions that end the run, and a retry that hides them


def test_a_file_continues_where_its_read_failed(tmp_path: Path, faulty_reads: FaultyReads) -> None:
    data = b"".join(b"line %d\n" % i for i in range(400_000))  # several reads
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    plain.write_bytes(data)
    packed.write_bytes(gzip.compress(data, 1))
    with open_for_reading(str(plain)) as file:
        head = file.read(2_000_000)
        faulty_reads(str(plain), 3, errno.EIO)
        assert head + file.read() == data  # catches a read that starts over after it was reopened
        file.seek(-8, os.SEEK_END)
        assert file.read() == data[-8:]
    faulty_reads(str(packed), 2, errno.ESTALE)
    with gzip.GzipFile(fileobj=open_for_reading(str(packed))) as unpacked:
        assert unpacked.read() == data
    faulty_reads(str(plain), 4, errno.EIO)
    with pytest.raises(StorageError, match="4 attempts"):
        open_for_reading(str(plain)).read(1)


def test_errors_about_the_file_are_the_callers(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_for_reading(str(tmp_path / "nowhere"))
    with pytest.raises(IsADirectoryError):
        open_for_reading(str(tmp_path))


def test_pauses_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pauses: list[float] = []
    monkeypatch.setattr(file_reading.time, "sleep", pauses.append)

    def read() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(StorageError):
        read_with_retries(read, "x")
    assert 1 <= len(pauses) <= 5
    assert sum(pauses) <= 5  # seconds; catches a data worker that looks dead


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_never_ends_is_not_read(tmp_path: Path, kind: str) -> None:
    """Catches an annotation file that is a pipe; opening it would wait forever for a writer."""
    path = tmp_path / "captions.json"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(OSError, match="not a regular file"):
        open_for_reading(str(path))
    with pytest.raises(ConfigError, match=r"cannot be read as .*not a regular file"):
        read_coco_captions(str(path), str(tmp_path))
