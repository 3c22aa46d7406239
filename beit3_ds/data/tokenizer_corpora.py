"""Reads the training files of a run, and yields the text on which the text tokenizer is trained."""

import warnings
from collections.abc import Iterator

from beit3_ds.config import DataConfig
from beit3_ds.data.files.patterns import expand_patterns
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.sources import open_images
from beit3_ds.data.text.paragraphs import BrokenLines, read_paragraphs, whole_file


def read_training_lines(config: DataConfig) -> Iterator[str]:
    """Yields all paragraphs of the training texts, followed by all captions of the training pairs.

    Broken lines and captions are skipped with a warning.

    Raises:
        ConfigError: if a pattern matches no file, if a file cannot be read, or if more than `max_broken_records` lines
            or captions are broken.
    """
    broken = BrokenLines(config.max_broken_records)
    for path in expand_patterns([source.path for source in config.texts.train]):
        yield from (paragraph.text for paragraph in read_paragraphs(whole_file(path), broken))
    for line in broken.lines:
        warnings.warn(f"left out: {line}", stacklevel=2)
    left_out: set[str] = set()
    for source in config.pairs.train:
        images = open_images(source, config.cache_dir)
        for index in range(len(images)):
            try:
                yield images.caption(index)
            except BrokenRecordError as error:
                if (name := images.name(index)) not in left_out:
                    left_out.add(name)
                    warnings.warn(f"left out: {error}", stacklevel=2)
                    broken.add(str(error))
