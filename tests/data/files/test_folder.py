"""Tests that folders are read by name, and that no name leads out of a folder."""

import os
from pathlib import Path

import pytest

from beit3_ds.data.files.folder import Folder
from beit3_ds.storage_error import StorageError


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Opens a folder with a file, a linked folder and a linked file; a secret file lies outside."""
    for name in ("inside", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "inside" / "a.txt").write_text("a")
    (tmp_path / "outside" / "secret.txt").write_text("secret")
    (tmp_path / "inside" / "linked").symlink_to(tmp_path / "outside")
    (tmp_path / "inside" / "link.txt").symlink_to(tmp_path / "outside" / "secret.txt")
    return Folder(str(tmp_path / "inside"))


def test_files_and_linked_folders_are_read(folder: Folder) -> None:
    assert folder.read("a.txt", 10) == b"a"
    assert folder.read("linked/secret.txt", 10) == b"secret"
    assert folder.holds("linked/secret.txt")
    with pytest.raises(ValueError, match="1 bytes exceed the limit of 0"):
        folder.read("a.txt", 0)


@pytest.mark.parametrize("name", ["../outside/secret.txt", "link.txt", "linked/../../outside/secret.txt"])
def test_no_name_leads_out(folder: Folder, name: str) -> None:
    assert not folder.holds(name)
    with pytest.raises(ValueError, match="leads out of the folder"):
        folder.read(name, 10)


def test_an_absolute_name_leads_out(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leads out of the folder"):
        folder.read(str(tmp_path / "outside" / "secret.txt"), 10)


def test_a_missing_file_is_the_datas_fault_and_a_missing_folder_is_not(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        folder.read("b.txt", 10)
    os.rename(tmp_path / "inside", tmp_path / "moved")
    with pytest.raises(StorageError):
        folder.read("a.txt", 10)
    (tmp_path / "inside").mkdir()  # as the empty mount point that an unmounted file system leaves
    with pytest.raises(StorageError, match="another folder is there now"):
        folder.read("a.txt", 10)
