"""Held-out files that are training files: a held-out loss over them says nothing, so they are refused."""

import os
from collections.abc import Iterator, Sequence

from beit3_ds.config import ConfigError, DataConfig, SourceConfig
from beit3_ds.data.file_reading import read_with_retries
from beit3_ds.data.files import expand_patterns, is_inside
from beit3_ds.data.image_source import printable
from beit3_ds.data.sources import image_format

_GROUPS = (("images", "pairs"), ("texts",))  # streams that can share files


def check_heldout_apart(data: DataConfig, must_exist: bool = True) -> None:
    """Refuses held-out files that are also trained on, whatever patterns or links name them.

    Files are compared by device and inode. Images and pairs are compared with each other, too: an image that is trained
    on alone is no longer held out with its caption. A folder is refused inside another one. Copies are not seen.

    Args:
        data: names the files.
        must_exist: refuse patterns without a match, too; else they count as no files.

    Raises:
        ConfigError: naming both files, or a pattern without a match.
        StorageError: if the file system fails.
    """
    streams = data.streams()
    for names in _GROUPS:
        heldout = {
            identity: path
            for name in names
            for identity, path in _identified(streams[name].heldout, name == "texts", must_exist)
        }
        folders = [path for path in heldout.values() if os.path.isdir(path)]
        trained = [(name, streams[name].train) for name in names if streams[name].samples_per_step]
        for name, sources in trained if heldout else ():
            for identity, path in _identified(sources, name == "texts", must_exist):
                if identity in heldout:
                    raise _overlap(path, heldout[identity], "are the same")
                for folder in folders if os.path.isdir(path) else ():
                    if is_inside(folder, path) or is_inside(path, folder):
                        raise _overlap(path, folder, "lie in one another")


def _identified(
    sources: Sequence[SourceConfig], is_text: bool, must_exist: bool
) -> Iterator[tuple[tuple[int, int], str]]:
    """What sources are read from, with device and inode; of annotated images the annotations."""
    for source in sources:
        paths = [source.path]
        if is_text or image_format(source) == "tar":
            try:
                paths = expand_patterns(paths)
            except ConfigError:
                if must_exist:
                    raise
        for path in paths:
            try:
                status = read_with_retries(lambda path=path: os.stat(path), path)  # type: ignore[misc]
            except OSError:  # who opens it says so
                continue
            yield (status.st_dev, status.st_ino), path


def _overlap(trained: str, heldout: str, how: str) -> ConfigError:
    return ConfigError(
        f"data: the training source {printable(trained)} and the held-out source {printable(heldout)} {how}. The "
        "held-out loss would be that of samples which are trained on: hold others out, or leave 'heldout' empty."
    )
