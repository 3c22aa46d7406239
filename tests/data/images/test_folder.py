"""Tests folders of images: their order, captions beside images, and no access to files outside."""

import os
import pickle
import signal
from pathlib import Path

import pytest

from beit3_ds.config import ConfigError
from beit3_ds.data.files.folder import Folder
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.images.compact_strings import CompactStrings
from beit3_ds.data.images.folder import ImageFolder
from beit3_ds.data.images.shards import TarShards
from beit3_ds.printing import printable
from beit3_ds.storage_error import StorageError
from tests.data.conftest import WriteTar


def _write(folder: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(folder)


def test_images_sorted_with_captions(tmp_path: Path, png: bytes) -> None:
    files = {"b.png": png, "a/z.JPG": png, "a/c.d.webp": png, "a/c.d.txt": b" a dot in the name \n"}
    files |= {".hidden.png": png, ".cache/x.png": png, "a/._z.jpg": b"", "notes.txt": b"no image", "a.png.part": b""}
    source = pickle.loads(pickle.dumps(ImageFolder(_write(tmp_path, files))))
    names = [os.path.relpath(source.name(i), tmp_path) for i in range(len(source))]
    assert names == ["a/c.d.webp", "a/z.JPG", "b.png"]  # catches the file system's order
    assert source.caption(0) == "a dot in the name"
    with pytest.raises(BrokenRecordError, match=r"z\.JPG: broken caption: .*No such file"):
        source.caption(1)
    assert all(source.image(i).mode == "RGB" for i in range(3))
    assert source.skipped == {
        "hidden file or folder": (3, ".cache"),
        "neither image nor caption, by its extension": (1, "a.png.part"),
        "text or JSON file without an image": (1, "notes.txt"),
    }


def test_links_out_of_the_folder_are_left_out(tmp_path: Path, png: bytes) -> None:
    folder = Path(_write(tmp_path / "in", {"real/a.png": png, "real/b.png": png, "real/c.png": png}))
    _write(tmp_path / "inside-or-not", {"x.png": png, "c.txt": b"a secret"})
    (folder / "1-out.png").symlink_to(tmp_path / "inside-or-not/x.png")
    (folder / "2-in.png").symlink_to("real/a.png")
    (folder / "3-dangling.png").symlink_to("nowhere.png")
    (folder / "4-loop.png").symlink_to("4-loop.png")
    (folder / "real/c.txt").symlink_to(tmp_path / "inside-or-not/c.txt")
    source = ImageFolder(str(folder))
    names = [os.path.relpath(source.name(i), folder) for i in range(len(source))]
    assert names == ["2-in.png", "real/a.png", "real/b.png", "real/c.png"]
    assert source.skipped == {"link to a file out of the folder, or to no file": (3, "1-out.png")}
    with pytest.raises(BrokenRecordError, match="leads out of the folder"):
        source.caption(3)
    (folder / "real/b.png").unlink()  # after the listing
    (folder / "real/b.png").symlink_to(tmp_path / "inside-or-not/x.png")
    with pytest.raises(BrokenRecordError, match="leads out of the folder"):
        source.image(2)


def test_class_folders_behind_links_are_read_once(tmp_path: Path, png: bytes) -> None:
    _write(tmp_path / "disk", {"cat/1.png": png, "cat/1.txt": b"a cat", "dog/2.png": png, "dog/more/3.png": png})
    folder = Path(_write(tmp_path / "train", {"bird/0.png": png, "bird/0.TXT": b"a bird"}))
    (folder / "cat").symlink_to(tmp_path / "disk/cat")
    (folder / "dog").symlink_to(tmp_path / "disk/dog")
    (folder / "a-second-cat").symlink_to(tmp_path / "disk/cat")
    (folder / "zoo").symlink_to("bird")
    (tmp_path / "disk/dog/more/up").symlink_to(tmp_path / "disk/dog")  # a loop
    (folder / "bird/above").symlink_to("../..")  # a loop through folders above
    (folder / "gone").symlink_to("nowhere")
    source = pickle.loads(pickle.dumps(ImageFolder(str(folder))))
    names = [os.path.relpath(source.name(i), folder) for i in range(len(source))]
    # catches links that are not followed, an endless walk, and images that count twice
    assert sorted(os.path.basename(name) for name in names) == ["0.png", "1.png", "2.png", "3.png"]
    assert "bird/0.png" in names  # by its own path, although `zoo` leads there, too
    assert all(source.image(i).mode == "RGB" for i in range(4))
    assert {source.caption(i) for i, name in enumerate(names) if name[-5] in "01"} == {"a bird", "a cat"}
    assert source.skipped["folder that was listed by another path"].num_members >= 4
    assert source.skipped["neither image nor caption, by its extension"] == (1, "gone")


def test_a_folder_that_is_gone_ends_the_run(tmp_path: Path, png: bytes) -> None:
    source = ImageFolder(_write(tmp_path / "mount", {"a.png": png, "b.png": png}))
    (tmp_path / "mount/a.png").unlink()
    with pytest.raises(BrokenRecordError, match=r"a\.png: broken image: No such file"):
        source.image(0)  # one deleted file is a broken record
    (tmp_path / "mount").rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match=rf"{tmp_path}/mount.*no longer mounted"):
        source.image(1)
    (tmp_path / "mount").mkdir()  # what is left of a mount point
    with pytest.raises(StorageError, match="another folder is there now"):
        source.image(1)  # catches a run whose budget is used up by a file system that was unmounted


def test_a_folder_beside_with_the_same_beginning_is_outside(tmp_path: Path) -> None:
    for name in ("a", "ab"):
        _write(tmp_path / name, {"b.png": b""})
    assert Folder(str(tmp_path / "a")).contains("b.png")
    assert not Folder(str(tmp_path / "a")).contains("../ab/b.png")  # catches a comparison without the separator


def test_a_pipe_is_not_waited_for(tmp_path: Path, png: bytes) -> None:
    source = ImageFolder(_write(tmp_path, {"a.png": png, "b.png": png}))
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    signal.alarm(20)  # ends the test instead of waiting forever
    with pytest.raises(BrokenRecordError, match="not a regular file"):
        source.image(0)
    signal.alarm(0)
    assert len(ImageFolder(str(tmp_path))) == 1


def test_zero_bytes_another_extension_and_strange_names(tmp_path: Path, png: bytes) -> None:
    source = ImageFolder(_write(tmp_path, {"0.png": b"", "1.gif": png, os.fsdecode(b"caf\xe9.jpg"): png}))
    with pytest.raises(BrokenRecordError, match=r"0\.png: broken image: empty file"):
        source.image(0)
    assert source.image(1).size == source.image(2).size
    source.name(2).encode("utf-8")  # a message must be printable


def test_names_of_two_lines_are_messages_of_one(tmp_path: Path, png: bytes, write_tar: WriteTar) -> None:
    """Catches a file name with a line break that continues the message on a second line."""
    folder = ImageFolder(_write(tmp_path / "f", {"a\nb.png": png, "c\r.heic": b""}))
    tar = TarShards([write_tar(tmp_path / "s.tar", {"a\nb.png": png})])
    for source in (folder, tar):
        assert "a\\nb" in source.name(0)
        with pytest.raises(BrokenRecordError, match=r"^[^\n]*a\\nb[^\n]*$"):
            source.caption(0)
    ((_, found),) = folder.skipped.items()
    assert printable(found.example) == "c\\r.heic"


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no image"):
        ImageFolder(str(tmp_path))
    with pytest.raises(ConfigError, match=r"nowhere cannot be listed"):
        ImageFolder(str(tmp_path / "nowhere"))


def test_compact_strings_keep_any_string() -> None:
    strings = ["", "a", "ü\U0001f426", "\ud800", "caf\udce9", "", "a\0b"]
    compact = CompactStrings(strings)
    assert [compact[i] for i in range(len(compact))] == strings
    for index in (-1, len(strings)):
        with pytest.raises(IndexError):
            compact[index]
