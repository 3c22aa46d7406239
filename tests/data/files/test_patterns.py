"""Tests file patterns with braces, home folders and stars, whose order depends only on the names."""

import errno
import json
import os
from pathlib import Path

import pytest

from beit3_ds.atomic_file import atomic_write, bounded_name
from beit3_ds.config import ConfigError, DataConfig, SourceConfig, StreamConfig
from beit3_ds.data.files.patterns import expand_braces, expand_patterns
from beit3_ds.data.images.shards import TarShards
from beit3_ds.data.prepare.annotations import prepare_annotations
from beit3_ds.data.prepare.index import prepare_indices
from beit3_ds.data.prepare.texts import prepare_texts
from beit3_ds.data.sources import check_no_sample_twice, open_images
from beit3_ds.data.text.sequences import TextSequences
from beit3_ds.storage_error import StorageError
from beit3_ds.tokenizers.text import TextTokenizer
from tests.data.conftest import WriteTar


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("s-{0008..0011}.tar", ["s-0008.tar", "s-0009.tar", "s-0010.tar", "s-0011.tar"]),
        ("s-{8..11}.tar", ["s-8.tar", "s-9.tar", "s-10.tar", "s-11.tar"]),  # catches a width without leading zeros
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("x{a,b{1,2}}", ["xa", "xb1", "xb2"]),
        ("{a,}b", ["ab", "b"]),
        ("{a}-{}-{1..}", ["{a}-{}-{1..}"]),  # no braces of a shell: names of files
        ("plain", ["plain"]),
    ],
)
def test_braces(pattern: str, expected: list[str]) -> None:
    assert sorted(expand_braces(pattern)) == sorted(expected)


def test_patterns_of_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["s-0000.tar", "s-0001.tar", "s-0002.tar", "t-0.tar", "a{0,1}.tar", "deep/er/u.tar"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("HOME", str(tmp_path))

    def expand(*patterns: str) -> list[str]:
        return [str(Path(path).relative_to(tmp_path)) for path in expand_patterns(patterns)]

    assert expand("~/s-{0000..0002}.tar") == names[:3]
    assert expand(f"{tmp_path}/{{t-*,s-000?}}.tar") == [names[3], *names[:3]]
    assert expand(f"{tmp_path}/a{{0,1}}.tar") == ["a{0,1}.tar"]  # a name that exists
    assert expand("~/**/*.tar") == sorted(names)
    assert expand("~/deep/**") == ["deep/er/u.tar"]
    with pytest.raises(ConfigError, match=r"no file matches '.*/s-0003\.tar', which is part of '~/s-\{0001\.\.0003\}"):
        expand("~/s-{0001..0003}.tar")  # catches a shard of the range that is missing without a word
    with pytest.raises(ConfigError, match=r"matches the folder .*/deep\. Match files"):
        expand("~/*")  # catches files in a folder that are left out without a word
    with pytest.raises(ConfigError, match="more than 1,000,000 numbers"):
        expand("~/{0..99999999}.tar")


def test_braces_that_spell_out_too_much_are_refused() -> None:
    """Catches nested braces whose expansion fills the memory."""
    with pytest.raises(ConfigError, match="spell out more than 1,000,000 names"):
        expand_braces("{0..99999}{0..99999}")
    assert expand_braces("{0..%s}" % ("9" * 5000)) == ["{0..%s}" % ("9" * 5000)]  # no number that anybody means
    assert len(expand_braces("{a," * 2000 + "b" + "}" * 2000)) == 2  # catches recursion


def test_folders_below_stars_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/x/1.txt", "a/.hidden/2.txt", "out/3.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for number in range(3):  # with two links that lead up, Python's own ** takes 2**40 steps
        (tmp_path / f"a/x/up{number}").symlink_to("..")
    (tmp_path / "a/b").symlink_to("../out")
    expected = ["a/b/3.txt", "a/x/1.txt"]
    assert expand_patterns([f"{tmp_path}/a/**/*.txt"]) == [f"{tmp_path}/{name}" for name in expected]
    assert expand_patterns([f"{tmp_path}/o*/**"]) == [f"{tmp_path}/out/3.txt"]
    monkeypatch.chdir(tmp_path / "a")
    assert expand_patterns(["**/*.txt"]) == ["b/3.txt", "x/1.txt"]
    assert expand_patterns(["**"]) == ["b/3.txt", "x/1.txt"]
    scandir = os.scandir

    def fail(path: str) -> object:
        if str(path).endswith("x"):
            raise OSError(errno.EIO, "Input/output error")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(StorageError, match="cannot read x in 4 attempts"):  # catches files that are lost with a folder
        expand_patterns(["**/*.txt"])


@pytest.mark.parametrize("pattern", ["pipe.txt", "p*.txt", "zero.txt"])
def test_pipes_and_devices_are_refused(tmp_path: Path, pattern: str) -> None:
    """Catches a read that never ends."""
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=r"\.txt is a pipe, a socket or a device"):
        expand_patterns([str(tmp_path / pattern)])


def test_two_names_of_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "soft.txt").symlink_to("a.txt")
    os.link(tmp_path / "a.txt", tmp_path / "hard.txt")
    for names in (("a.txt", "a.txt"), ("a.txt", "soft.txt"), ("a.txt", "hard.txt"), ("[ah]*.txt",)):
        with pytest.raises(ConfigError, match=r"is listed twice|are the same file"):
            check_no_sample_twice([SourceConfig(path=str(tmp_path / name)) for name in names])


def test_folders_in_one_another_are_refused(tmp_path: Path) -> None:
    for name in ("a/b", "ab"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/b")
    check_no_sample_twice([SourceConfig(path=str(tmp_path / name)) for name in ("a", "ab")])
    for name in ("a/b", "link"):  # its images would be trained on twice an epoch
        with pytest.raises(ConfigError, match=r"is inside .*count twice"):
            check_no_sample_twice([SourceConfig(path=str(tmp_path / other)) for other in ("a", name)])


LONG = "\u00e4" + "n" * 230  # bytes of a name: 232 and an extension


def test_long_names_have_files_of_their_own(
    tmp_path: Path, write_tar: WriteTar, png: bytes, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "h" * 64)
    prepared, images = str(tmp_path / "prepared"), tmp_path / "images"
    images.mkdir()
    texts, annotations, tars = [], [], []
    for end in "12":  # names that begin alike
        image = images / f"{LONG}{end}.png"
        image.write_bytes(png)
        captions = {"images": [{"id": 1, "file_name": image.name}], "annotations": [{"image_id": 1, "caption": end}]}
        annotations.append(tmp_path / f"{LONG}{end}.json")
        annotations[-1].write_text(json.dumps(captions))
        texts.append(tmp_path / f"{LONG}{end}.txt")
        texts[-1].write_text("snow" * int(end))
        tars.append(
            write_tar(tmp_path / f"{LONG}{end}.tar", {f"{LONG}{end}.png": png, f"{LONG}{end}.txt": b"a" + end.encode()})
        )
    none = StreamConfig(train=(), samples_per_step=0)
    sources = tuple(SourceConfig(path=str(path), format="coco", images=str(images)) for path in annotations)
    text_sources = tuple(SourceConfig(path=str(path)) for path in texts)
    data = DataConfig(
        images=none,
        pairs=StreamConfig(train=sources, samples_per_step=1),
        texts=StreamConfig(train=text_sources, samples_per_step=1),
        cache_dir=prepared,
        text_length=16,
    )
    prepare_indices(tars, prepared, num_processes=1)
    prepare_annotations(data)
    prepare_texts(data, tokenizer, processes=1)
    shards = TarShards(tars, prepared)
    assert [shards.caption(i) for i in range(2)] == ["a1", "a2"]  # catches two sources that share an index
    assert [open_images(source, prepared).caption(0) for source in sources] == ["1", "2"]
    assert open_images(SourceConfig(path=str(images)), None).image(1).mode == "RGB"
    rows = [TextSequences([str(path)], tokenizer, 16, prepared)[0].tolist() for path in texts]
    assert rows == [TextSequences([str(path)], tokenizer, 16)[0].tolist() for path in texts]
    assert rows[0] != rows[1]
    with atomic_write(tmp_path / f"{LONG}.spm") as file:  # catches a temporary name that is too long
        file.write(b"x")


@pytest.mark.parametrize("name", ["a", "a.tar", "n" * 107])
def test_short_names_stay_as_they_are(name: str) -> None:
    assert bounded_name(name) == name
    assert len(bounded_name(name + "n" * 200).encode()) <= 113


def test_a_link_to_a_folder_around_the_pattern_is_not_followed(tmp_path: Path) -> None:
    """Catches a link to / or to a parent folder, through which the whole file system would be listed."""
    data = tmp_path / "data"
    (data / "inner").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("data/a.txt", "data/inner/b.txt", "outside.txt", "other/c.txt"):
        (tmp_path / name).write_text("x")
    (data / "root").symlink_to("/")
    (data / "inner" / "parent").symlink_to(tmp_path)
    (data / "inner" / "itself").symlink_to(data)
    (data / "linked").symlink_to(tmp_path / "other")
    found = expand_patterns([f"{data}/**/*.txt"])
    assert found == [f"{data}/a.txt", f"{data}/inner/b.txt", f"{data}/linked/c.txt"]
