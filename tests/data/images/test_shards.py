"""Tests tar shards: grouping of members, reading, and errors that name the file."""

import gzip
import os
import socket
from pathlib import Path

import pytest

from beit3_ds.config import ConfigError
from beit3_ds.data.files import reading as file_reading
from beit3_ds.data.files.patterns import expand_patterns
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.images.shard_index import index_path
from beit3_ds.data.images.shards import TarShards
from beit3_ds.data.prepare.index import prepare_indices
from beit3_ds.storage_error import StorageError
from tests.data.conftest import WriteTar


def test_members_are_grouped_by_webdatasets_rule(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    members = {
        "a/1.png": png,
        "a/1.txt": b" one \n",
        "b/1.JPG": png,  # catches a key without its folder, and an extension that must be lower case
        "b/1.txt": b"another",
        "c.1/2.seg.png": b"a mask",  # catches a key cut at the last dot, or at the folder's dot
        "c.1/2.png": png,
        "c.1/2.json": b"{}",
        "._hidden.png": b"",
    }
    shards = TarShards([write_tar(tmp_path / "s.tar", members)])
    assert [shards.name(i).rpartition(":")[2] for i in range(len(shards))] == ["a/1", "b/1", "c.1/2"]
    assert [shards.caption(i) for i in range(2)] == ["one", "another"]
    assert all(shards.image(i).mode == "RGB" for i in range(3))


def test_keys_with_dots_are_samples_of_their_own(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    members = {f"v.{name}.{kind}": data for name in ("one", "two") for kind, data in (("jpg", png), ("txt", b"cap"))}
    members |= {"1.5 m/a.b/Dr. No.JPEG": png, "1.5 m/a.b/Dr. No.json": b'{"caption": "a doctor"}'}
    members |= {"x.png": png, "x.left.png": png, "x.0.txt": b"of x", "c.txt": b"c", "c.seg.png": png}
    members |= {"y.avif": b"", "z.cls": b"3", "noext": b"", "w/.DS_Store": b"", "w/._x.png": b""}
    shards = TarShards([write_tar(tmp_path / "s.tar", members)])
    names = [shards.name(i).rpartition(":")[2] for i in range(len(shards))]
    assert names == ["v.one", "v.two", "1.5 m/a.b/Dr. No", "x", "c"]  # catches samples lost at their first dot
    assert [shards.caption(i) for i in range(3)] == ["cap", "cap", "a doctor"]
    assert all(shards.image(i).mode == "RGB" for i in range(4))
    # catches a member that is neither read nor counted
    assert {reason: found.num_members for reason, found in shards.skipped.items()} == {
        "further part of a sample (KEY.PART.png beside KEY.png or KEY.txt)": 3,
        "image in a format that is not read": 1,
        "neither image nor caption, by its extension": 2,
        "hidden file": 2,
    }


def test_several_shards_in_sorted_order(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    for name in ("b", "a"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}{i}.txt": f"{name}{i}".encode() for i in range(3)})
    shards = TarShards([str(tmp_path / "*.tar")])
    # catches the file system's order, and an offset looked up in the wrong shard
    assert [shards.caption(i) for i in range(len(shards))] == ["a0", "a1", "a2", "b0", "b1", "b2"]


def test_a_pattern_without_match_names_pattern_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"no-such-\*\.tar.*{tmp_path}"):
        TarShards([str(tmp_path / "no-such-*.tar")])


def test_a_file_matched_twice_is_refused(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.png": png})
    with pytest.raises(ConfigError, match=r"a\.tar is listed twice"):  # catches samples repeated in one epoch
        TarShards([path, str(tmp_path / "*.tar")])


@pytest.mark.parametrize("kept", [0, 300, 512 + 100, 1024, 2048])
def test_a_truncated_shard_is_named(tmp_path: Path, write_tar: WriteTar, kept: int) -> None:
    path = Path(write_tar(tmp_path / "cut.tar", {"a.txt": b"x" * 400, "b.txt": b"y" * 400}))
    path.write_bytes(path.read_bytes()[:kept])
    # cut before, in, and after a header, in the data, and (1024, 2048) at the end of a member, where tarfile is silent
    with pytest.raises(ConfigError, match=r"cut\.tar"):
        TarShards([str(path)])


def test_a_damaged_header_is_no_end_of_archive(tmp_path: Path, write_tar: WriteTar) -> None:
    path = Path(write_tar(tmp_path / "bad.tar", {"a.txt": b"x" * 400, "b.txt": b"y" * 400}))
    data = bytearray(path.read_bytes())
    data[1024 + 10] ^= 0xFF  # the second header's checksum fails, and tarfile stops without an error
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"bad\.tar.*byte 1024"):
        TarShards([str(path)])


def test_other_files_and_empty_tars_are_refused(tmp_path: Path, write_tar: WriteTar) -> None:
    (tmp_path / "text.tar").write_text("no tar at all, " * 100)
    with pytest.raises(ConfigError, match=r"text\.tar"):
        TarShards([str(tmp_path / "text.tar")])
    with pytest.raises(ConfigError, match=r"empty\.tar holds no samples"):
        TarShards([write_tar(tmp_path / "empty.tar", {})])


def test_an_empty_tar_among_others_is_counted(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    for name, members in {"0": {}, "1": {"a.png": png}, "2": {"x.mp4": b""}, "3": {"b.png": png}, "4": {}}.items():
        write_tar(tmp_path / f"{name}.tar", members)
    pattern = str(tmp_path / "*.tar")
    prepare_indices(expand_patterns([pattern]), str(tmp_path), num_processes=1)
    for shards in (TarShards([pattern]), TarShards([pattern], str(tmp_path))):
        assert [shards.name(i).rpartition("/")[2] for i in range(2)] == ["1.tar:a", "3.tar:b"]
        assert shards.image(1).mode == "RGB"
        assert shards.skipped["tar without samples"] == (3, str(tmp_path / "0.tar"))
        assert shards.skipped["neither image nor caption, by its extension"].num_members == 1
    with pytest.raises(ConfigError, match=r"none of 2 tars.*holds no samples.*x\.mp4"):
        TarShards([str(tmp_path / "[24].tar")])


@pytest.mark.parametrize(
    ("name", "data", "advice"),
    [
        ("a.tar", gzip.compress(b"some members", mtime=0), "gzip data: decompress it"),
        ("a.tar.gz", gzip.compress(b"some members", mtime=0), "gzip data: decompress it"),
        ("a.csv", b"http://x/1.jpg,a dog\n" * 99, 'needs its own format, such as "format": "conceptual_captions"'),
        ("a.zip", b"PK\x03\x04" + bytes(600), "a zip archive: leave it out"),
        ("a.tar", b"", "Fetch it again"),
    ],
)
def test_a_file_that_is_no_tar_is_told_what_to_do(tmp_path: Path, name: str, data: bytes, advice: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        TarShards([str(tmp_path / name)])
    assert advice in str(caught.value)


def test_broken_records_name_shard_key_and_reason(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    members = {
        "cut.png": png[:60],
        "cut.txt": b"fine",
        "latin.png": png,
        "latin.txt": "caf\xe9".encode("latin-1"),
        "blank.txt": b" \n",
    }
    shards = TarShards([write_tar(tmp_path / "s.tar", members)])  # catches a scan that fails for one broken record
    with pytest.raises(BrokenRecordError, match=r"s\.tar:cut: broken image"):
        shards.image(0)
    with pytest.raises(BrokenRecordError, match=r"s\.tar:latin: broken caption"):
        shards.caption(1)
    with pytest.raises(BrokenRecordError, match=r"s\.tar:blank: no image \(\.jpg"):
        shards.image(2)
    with pytest.raises(BrokenRecordError, match=r"s\.tar:blank: broken caption: empty"):
        shards.caption(2)


def test_a_shard_that_shrinks_breaks_its_records(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    path = Path(write_tar(tmp_path / "s.tar", {"a.png": png}))
    shards = TarShards([str(path)])
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(BrokenRecordError, match=r"size and mtime_ns \(600, \d+\), but had"):
        shards.image(0)


def test_a_shard_or_index_that_vanishes_ends_the_run(
    tmp_path: Path, write_tar: WriteTar, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_reading, "_PAUSES", (0.0, 0.0, 0.0))
    tar = write_tar(tmp_path / "s.tar", {"a.png": png})
    prepare_indices([tar], str(tmp_path), num_processes=1)
    scanned, indexed, unread = TarShards([tar]), TarShards([tar], str(tmp_path)), TarShards([tar], str(tmp_path))
    os.unlink(tar)
    for shards in (scanned, indexed):
        with pytest.raises(
            StorageError, match=rf"{socket.gethostname()} cannot read {tar} in 4 attempts.*No such file"
        ):
            shards.image(0)  # catches a lost mount that is counted record by record
    os.unlink(index_path(str(tmp_path), tar))
    with pytest.raises(StorageError, match=r"s\.tar.*\.index"):
        unread.name(0)
    assert indexed.name(0) == f"{tar}:a"  # what is mapped stays


def test_a_shard_that_shrinks_while_it_is_open_breaks_what_is_gone(
    tmp_path: Path, write_tar: WriteTar, png: bytes
) -> None:
    path = Path(write_tar(tmp_path / "s.tar", {"a.txt": b"first", "b.png": png}))
    shards = TarShards([str(path)])
    assert shards.caption(0) == "first"
    os.truncate(path, 512 + 512 + 512 + 88)
    with pytest.raises(BrokenRecordError, match=r"s\.tar:b: only 88 of \d+ bytes left"):
        shards.image(1)


@pytest.mark.parametrize("between", [b"", b"x" * 3000, b"x" * 300_000])
@pytest.mark.parametrize("caption_first", [True, False])
def test_a_pair_is_its_image_and_its_caption(
    tmp_path: Path, write_tar: WriteTar, png: bytes, between: bytes, caption_first: bool
) -> None:
    members = {"p.png": png, "p.txt": b"a caption"}
    first, second = sorted(members, reverse=caption_first)
    path = write_tar(tmp_path / "s.tar", {first: members[first], "p.other": between, second: members[second]})
    shards = TarShards([path])
    image, caption = shards.pair(0)
    # catches offsets in the common range that are mixed up, and a wide gap that is read along
    assert (caption, image.tobytes()) == ("a caption", shards.image(0).tobytes())


def test_a_pair_without_one_of_its_halves_names_what_is_missing(
    tmp_path: Path, write_tar: WriteTar, png: bytes
) -> None:
    shards = TarShards(
        [write_tar(tmp_path / "s.tar", {"a.png": png, "b.txt": b"text", "c.png": b"", "c.txt": b"text"})]
    )
    for index, fault in enumerate(("a: no caption", "b: no image", "c: broken image: .*empty file")):
        with pytest.raises(BrokenRecordError, match=fault):
            shards.pair(index)
