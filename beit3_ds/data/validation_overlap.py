"""Checks that no validation or test file is also a training file; a shared file would make the scores meaningless."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from beit3_ds.config import ConfigError, DataConfig, SourceConfig
from beit3_ds.config.data import Split
from beit3_ds.data.files.patterns import expand_patterns, is_inside, list_folders
from beit3_ds.data.files.reading import read_with_retries
from beit3_ds.data.sources import check_no_sample_twice, image_format
from beit3_ds.printing import printable


@runtime_checkable
class NamesImages(Protocol):
    """Interface of samples whose annotations name image files."""

    def image_files(self) -> Iterable[str]:
        """Yields the paths of the image files that the annotations name; may repeat a path."""


_GROUPS = (("images", "pairs"), ("texts",))  # streams that can share files


def check_validation_apart(data: DataConfig, must_exist: bool = True) -> None:
    """Checks that no validation or test file is also a training file, even under another path or link.

    Validation and test files are compared with the training files of the same stream. Files of "images" and "pairs" are
    compared with the training files of both streams, because both streams contain images. Two files are the same if
    they have equal device and inode. The same file is allowed in two sources if both set `SourceConfig.split`, to
    different values, because they then read different parts of the file. Copies of files are not detected.

    A validation or test folder must not be inside a training folder, nor a training folder inside a validation or test
    folder. No folder may be reachable through links from both a training folder and a validation or test folder. One
    exception: a training source and a validation or test source may use the same folder if both set
    `SourceConfig.split`, to different values.

    Args:
        data: data section of the run's config.
        must_exist: whether a pattern without a matching file is an error.

    Raises:
        ConfigError: if training data overlaps with validation or test data (the message names both paths), if two
            training, two validation or two test sources of a stream overlap, or if a pattern matches no file although
            `must_exist` is true.
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
        folders = [(path, split) for (_, _, split), path in validation.items() if os.path.isdir(path)]
        trained = [(name, streams[name].train) for name in names if streams[name].samples_per_step]
        for name, sources in trained if validation else ():
            for identity, path in _identified(sources, name == "texts", must_exist):
                if identity in validation:
                    raise _overlap(path, validation[identity], "are the same")
                for folder, split in folders if os.path.isdir(path) else ():
                    if folder == path and split and identity[2] and split != identity[2]:
                        continue  # two splits of one dataset, which the task separates
                    if is_inside(folder, path) or is_inside(path, folder):
                        raise _overlap(path, folder, "contain one another")
                    if shared := _shared_folder(path, folder):
                        raise _overlap(path, folder, f"share {printable(shared)} through links")
    for stream in streams.values():
        for sources in (stream.train if stream.samples_per_step else (), stream.validation, stream.test):
            check_no_sample_twice(sources, must_exist)


def describe_shared_images(splits: Mapping[Split, Iterable[object]]) -> list[str]:
    """Returns a warning for each pair of splits that share image files, with the number of shared files.

    Shared images make scores too good. They are not an error, because the texts of an image may differ between splits.

    Args:
        splits: samples of each split; only samples that implement `NamesImages` are compared.
    """
    lines = []
    for first, second in itertools.combinations(splits, 2):
        later = set(_image_files(splits[second]))  # training images, which may be millions, are not kept
        if shared := {path for path in _image_files(splits[first]) if path in later}:
            lines.append(
                f"WARNING: {len(shared):,} of {len(later):,} images of {second} are also images of {first}, such as "
                f"{printable(min(shared))}; scores over images that were trained on are too good"
            )
    return lines


def _image_files(sources: Iterable[object]) -> Iterator[str]:
    return (path for samples in sources if isinstance(samples, NamesImages) for path in samples.image_files())


def _identified(
    sources: Sequence[SourceConfig], is_text: bool, must_exist: bool
) -> Iterator[tuple[tuple[int, int, str], str]]:
    """Yields two values for each file or folder of the sources: its identity and its path. Images that are named in
    annotation files are not included.

    The identity is (device, inode, `SourceConfig.split`). It contains the split, because two sources may read different
    parts of one annotation file.
    """
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
    """Returns a folder that can be reached from both folders, `trained` and `validation`; "" if there is none.

    Compares `trained`, `validation` and all folders below them by device and inode. Links to folders are followed.
    """
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
