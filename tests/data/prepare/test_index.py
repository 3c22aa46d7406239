"""Tests index files: they give the samples of a scan, are whole or absent, and changes of a tar are noticed."""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from beit3_ds.config import ConfigError, DataConfig, SourceConfig, StreamConfig
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.images.shard_index import index_path
from beit3_ds.data.images.shards import TarShards
from beit3_ds.data.prepare.index import describe_folders, prepare_indices
from tests.data.conftest import WriteTar


def _members(png: bytes, prefix: str) -> Mapping[str, bytes]:
    samples: dict[str, bytes] = {}
    for i in range(4):
        samples |= {
            f"{prefix}{i}.png": png,
            f"{prefix}{i}.json": json.dumps({"caption": f"{prefix} json {i}"}).encode(),
        }
        if i % 2:
            samples[f"{prefix}{i}.txt"] = f"{prefix} text {i}".encode()
    return samples


@pytest.fixture
def tars(tmp_path: Path, write_tar: WriteTar, png: bytes) -> list[str]:
    """Writes two shards of four pairs; half of the captions exist only in JSON."""
    return [write_tar(tmp_path / f"{prefix}.tar", _members(png, prefix)) for prefix in ("a", "longer")]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_indexed_shards_are_the_scanned_ones(tars: list[str], tmp_path: Path, num_processes: int) -> None:
    prepared = str(tmp_path / "prepared")
    shards = prepare_indices(tars, prepared, num_processes=num_processes)
    assert [(shard.tar, shard.action, shard.num_samples) for shard in shards] == [(t, "written", 4) for t in tars]
    scanned, indexed = TarShards(tars), pickle.loads(pickle.dumps(TarShards(tars, prepared)))
    assert len(scanned) == len(indexed) == 8
    for i in range(8):
        assert scanned.name(i) == indexed.name(i)
        assert scanned.caption(i) == indexed.caption(i)
        np.testing.assert_array_equal(scanned.image(i), indexed.image(i))
    # .txt is preferred to .json, although it comes later in the tar
    assert [indexed.caption(i) for i in (0, 1, 4)] == ["a json 0", "a text 1", "longer json 0"]


def test_opening_with_an_index_reads_no_headers(tars: list[str], tmp_path: Path) -> None:
    prepared = str(tmp_path / "prepared")
    prepare_indices(tars, prepared, num_processes=1)
    status = os.stat(tars[0])
    Path(tars[0]).write_bytes(bytes(status.st_size))
    os.utime(tars[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    shards = TarShards(tars, prepared)  # catches an index that is written but not used
    with pytest.raises(BrokenRecordError, match="a0: broken image"):
        shards.image(0)


def test_a_second_run_keeps_what_is_there_and_renews_what_changed(
    tars: list[str], tmp_path: Path, write_tar: WriteTar, png: bytes
) -> None:
    prepared = str(tmp_path / "prepared")
    prepare_indices(tars[:1], prepared, num_processes=1)  # as if it had been stopped here
    assert [s.action for s in prepare_indices(tars, prepared, num_processes=1)] == ["kept", "written"]
    write_tar(Path(tars[1]), {"new.png": png})
    with pytest.raises(ConfigError, match=r"longer\.tar has size .* its index .*beit3 prepare index"):
        TarShards(tars, prepared)
    assert [s.action for s in prepare_indices(tars, prepared, num_processes=1)] == ["kept", "written"]
    assert len(TarShards(tars, prepared)) == 5
    assert not [name for name in os.listdir(tmp_path / "prepared/index") if not name.endswith(".index")]


def test_another_modification_time_is_refused(tars: list[str], tmp_path: Path) -> None:
    prepare_indices(tars, str(tmp_path), num_processes=1)
    os.utime(tars[0], ns=(1, 1))
    with pytest.raises(ConfigError, match=r"a\.tar has mtime_ns 1,"):
        TarShards(tars, str(tmp_path))


def test_verify_finds_one_flipped_bit_under_the_old_date(tars: list[str], tmp_path: Path) -> None:
    prepare_indices(tars, str(tmp_path), num_processes=1)
    assert {s.action for s in prepare_indices(tars, str(tmp_path), verify=True, num_processes=1)} == {"verified"}
    path, status = Path(tars[0]), os.stat(tars[0])
    data = bytearray(path.read_bytes())
    data[data.index(b"a text 3")] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert TarShards(tars, str(tmp_path)).caption(3) == "` text 3"  # so a read alone does not see it
    with pytest.raises(ConfigError, match=r"(?s)1 of 2 tars failed.*a\.tar no longer fits.*1 samples differ.*\(a3\)"):
        prepare_indices(tars, str(tmp_path), verify=True, num_processes=1)


def test_a_broken_tar_stops_no_other(tars: list[str], tmp_path: Path) -> None:
    Path(tars[0]).write_bytes(Path(tars[0]).read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"(?s)1 of 2 tars failed.*a\.tar cannot be read"):
        prepare_indices(tars, str(tmp_path), num_processes=2)
    assert not os.path.exists(index_path(str(tmp_path), tars[0]))
    assert len(TarShards(tars[1:], str(tmp_path))) == 4


def test_a_damaged_index_is_named(tars: list[str], tmp_path: Path) -> None:
    prepare_indices(tars, str(tmp_path), num_processes=1)
    path = Path(index_path(str(tmp_path), tars[0]))
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:20], b"[]\n", b"{}\n", whole.replace(b'"format": 2', b'"format": 9')):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=rf"{path.name} of .* is damaged"):
            TarShards(tars, str(tmp_path))
    path.write_bytes(whole[:-1] + b"?")  # in the records, which are not read at opening
    with pytest.raises(ConfigError, match="checksum"):
        prepare_indices(tars, str(tmp_path), verify=True, num_processes=1)
    assert prepare_indices([tars[0]], str(tmp_path), num_processes=1)[0].action == "kept"


def test_tars_of_one_name_in_two_folders_have_two_indices(tmp_path: Path) -> None:
    assert index_path("p", str(tmp_path / "a/0.tar")) != index_path("p", str(tmp_path / "b/0.tar"))
    assert index_path("p", "a/0.tar") == index_path("p", os.path.abspath("a/0.tar"))


def test_members_left_out_are_counted_with_an_example(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    path = Path(write_tar(tmp_path / "s.tar", {"a.png": png, "a.jpg": png, "../b.png": png, "c.txt": b"first"}))
    other = Path(write_tar(tmp_path / "t.tar", {"c.txt": b"later", "/d.txt": b"x"}))
    joined = path.read_bytes().rstrip(b"\0")
    joined += bytes(-len(joined) % 512) + other.read_bytes()  # one name twice in one archive
    path.write_bytes(joined)
    prepare_indices([str(path)], str(tmp_path), num_processes=1)
    for shards in (TarShards([str(path)]), TarShards([str(path)], str(tmp_path))):
        assert [shards.name(i).rpartition(":")[2] for i in range(len(shards))] == ["a", "c"]
        assert shards.caption(1) == "first"
        assert shards.skipped == {
            "second image of a sample": (1, f"{path}:a.jpg"),
            "unsafe name": (2, f"{path}:../b.png"),
            "name twice": (1, f"{path}:c.txt"),
        }


def test_folders_of_images_are_looked_at(tmp_path: Path, png: bytes) -> None:
    """Catches a wrong folder that the preparation accepts and the run refuses."""
    for name in ("good", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "good/a.png").write_bytes(png)

    def describe(name: str) -> list[str]:
        stream = StreamConfig(train=(SourceConfig(path=str(tmp_path / name)),), samples_per_step=1)
        return describe_folders(DataConfig(images=stream, pairs=stream))

    assert describe("good") == [f"folder {tmp_path}/good: 1 images; it needs no index"]
    with pytest.raises(ConfigError, match="no image"):
        describe("empty")
