"""Refuses validation and test files that are also training files, because scores over them are meaningless."""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence

from beit3_ds.config import ConfigError, DataConfig, SourceConfig
from beit3_ds.config.data import Split
from beit3_ds.data.files.patterns import expand_patterns, is_inside, list_folders
from beit3_ds.data.files.printing import printable
from beit3_ds.data.files.reading import read_with_retries
from beit3_ds.data.images.annotated import AnnotatedImages
from beit3_ds.data.sources import check_no_file_twice, image_format

_GROUPS = (("images", "pairs"), ("texts",))  # streams that can share files


def check_validation_apart(data: DataConfig, must_exist: bool = True) -> None:
    """Refuses validation and test files that are also training files, whatever patterns or links name them.

    Files are compared by device and inode, and by the part of the file that a source reads (`SourceConfig.split`).
    Images are also compared with pairs, because training on an image without its caption would spoil validation of the
    pair. A validation folder inside a training folder, or the reverse, is refused. Copies of files are not detected.

    Args:
        data: data section of the run's config.
        must_exist: also refuse patterns without a match; otherwise such patterns count as no files.

    Raises:
        ConfigError: with the names of both files, or of a pattern without a match; also if `check_no_file_twice` does.
        StorageError: if the file system fails.
    """
    streams = data.streams()
    for names in _GROUPS:
        validation = {
            identity: path
            for name in names
            for sources in (streams[name].validation, streams[name].test)
            for identity, path in _identified(sources, name == "texts", must_exist)
        }
        folders = [path for path in validation.values() if os.path.isdir(path)]
        trained = [(name, streams[name].train) for name in names if streams[name].samples_per_step]
        for name, sources in trained if validation else ():
            for identity, path in _identified(sources, name == "texts", must_exist):
                if identity in validation:
                    raise _overlap(path, validation[identity], "are the same")
                for folder in folders if os.path.isdir(path) else ():
                    if is_inside(folder, path) or is_inside(path, folder):
                        raise _overlap(path, folder, "contain one another")
                    if shared := _shared_folder(path, folder):
                        raise _overlap(path, folder, f"share {printable(shared)} through links")
    for stream in streams.values():
        for sources in (stream.train if stream.samples_per_step else (), stream.validation, stream.test):
            check_no_file_twice(sources, must_exist)


def describe_shared_images(splits: Mapping[Split, Sequence[AnnotatedImages]]) -> list[str]:
    """Returns a line per two splits that name the same image files, with their number.

    Such splits are allowed, because questions and captions may differ, but a score over known images is too good.
    """
    files = {
        split: {
            os.path.join(source.images.path, source.paths[number])
            for source in sources
            for number in range(len(source.paths))
        }
        for split, sources in splits.items()
    }
    lines = []
    for first, second in itertools.combinations(files, 2):
        if shared := sorted(files[first] & files[second]):
            lines.append(
                f"WARNING: {len(shared):,} of {len(files[second]):,} images of {second} are also images of {first}, "
                f"such as {printable(shared[0])}; scores over images that were trained on are too good"
            )
    return lines


def _identified(
    sources: Sequence[SourceConfig], is_text: bool, must_exist: bool
) -> Iterator[tuple[tuple[int, int, str], str]]:
    """Yields device, inode, split and path of the files of sources; annotated images count as their annotation file."""
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
            except OSError:  # opening the source reports the error
                continue
            yield (status.st_dev, status.st_ino, source.split), path


def _shared_folder(trained: str, validation: str) -> str:
    """Returns the path below `trained` of a folder that links also place below `validation`; empty without one."""
    known = {_identity(folder) for folder in list_folders(validation)}
    return next((folder for folder in list_folders(trained) if _identity(folder) in known), "")


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _overlap(trained: str, validation: str, how: str) -> ConfigError:
    return ConfigError(
        f"data: the training source {printable(trained)} and the validation source {printable(validation)} {how}. The "
        "validation loss would be computed on training samples: name other files, or leave 'validation' empty."
    )
