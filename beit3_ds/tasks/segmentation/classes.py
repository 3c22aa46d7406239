"""Reads the names of segmentation classes from a file."""

import os

from beit3_ds.config import ConfigError, RunConfig
from beit3_ds.data.files.names import iterate_names
from beit3_ds.tasks.segmentation.files import NAMES_FILE

_NAME_COLUMN = "Name"


def read_class_names(config: RunConfig, path: str, num_classes: int) -> tuple[str, ...]:
    """Returns the names of all classes, in the order of the class indices.

    Args:
        config: the run's configuration.
        path: text file with one name per line, or a table like ADE20K's objectInfo150.txt. An empty path selects the
            objectInfo150.txt of the first `ade20k` source with such a file. If no source has the file, classes are
            named "class 0", "class 1" and so on.
        num_classes: number of classes.

    Raises:
        ConfigError: if the file cannot be read, or does not have `num_classes` names.
    """
    path = find_names_file(config, path)
    if not path:
        return tuple(f"class {index}" for index in range(num_classes))
    try:
        lines = [line.rstrip("\n") for line in iterate_names(path)]
    except (OSError, ValueError) as error:
        raise ConfigError(f"segmentation: {path} cannot be read as a list of classes: {error}.") from error
    names = _parse(lines)
    if len(names) != num_classes or not all(names):
        raise ConfigError(
            f"task.num_classes={num_classes}, but {path} has {len(names)} names. Correct one of the two, and give each "
            "class a name."
        )
    return tuple(names)


def find_names_file(config: RunConfig, path: str) -> str:
    """Returns the path of the file with class names, or an empty string if there is none.

    Args:
        config: the run's configuration.
        path: path of the file. An empty path selects the objectInfo150.txt of the first `ade20k` source with such a
            file.
    """
    if path:
        return path
    for source in config.data.images.sources:
        path = os.path.join(source.path, NAMES_FILE)
        if source.format == "ade20k" and os.path.isfile(path):
            return path
    return ""


def _parse(lines: list[str]) -> list[str]:
    """Returns the class names in lines of text: one per line, or the column "Name" of a tab-separated table."""
    filled = [line for line in lines if line.strip()]
    columns = filled[0].split("\t") if filled else []
    if len(columns) > 1 and columns[-1].strip() == _NAME_COLUMN:
        return [line.split("\t")[-1].strip() for line in filled[1:]]
    return [line.strip() for line in filled]
