"""Sources: numbered through, no file twice, and a clear word about what cannot be read."""

from pathlib import Path

import pytest

from beit3_ds.config import ConfigError, SourceConfig
from beit3_ds.data.sources import Parts, check_no_file_twice, open_images
from tests.data.conftest import WriteTar


def test_parts_are_numbered_through() -> None:
    parts = Parts(["ab", "", "cde"])
    assert len(parts) == 5
    # catches an off-by-one at the borders, and an empty part
    assert [part[i] for part, i in map(parts.locate, range(5))] == list("abcde")


def test_a_file_of_two_sources_is_refused(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.png": png})
    with pytest.raises(ConfigError, match=r"a\.tar is listed twice"):
        check_no_file_twice([SourceConfig(path=path), SourceConfig(path=str(tmp_path / "*.tar"))])


def test_images_open_by_their_format(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.png": png})
    assert len(open_images(SourceConfig(path=path))) == 1
    with pytest.raises(ConfigError, match="format folder, which cannot be read"):
        open_images(SourceConfig(path=str(tmp_path)))
