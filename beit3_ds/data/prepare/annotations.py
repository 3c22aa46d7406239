"""Writes and verifies binary tables of parsed annotation files."""

import os

import numpy as np
from tqdm import tqdm

from beit3_ds.config import ConfigError, DataConfig, SourceConfig
from beit3_ds.data.images.annotated import AnnotatedImages
from beit3_ds.data.images.annotation_table import StoredAnnotations, describe_files, write_table
from beit3_ds.data.sources import annotation_files, count_missing_images, read_annotations, source_table


def prepare_annotations(config: DataConfig, *, verify: bool = False) -> str:
    """Parses the annotation files of a run's sources, and writes one table per source into `cache_dir`.

    Sources in a task's own format are skipped. Existing tables are rewritten, because an image folder may contain new
    images.

    Args:
        config: data section of the run's config; `cache_dir` must be set.
        verify: whether to compare existing tables with the files instead of rewriting them. Missing tables are written
            in any case.

    Returns:
        One summary line, and one line per source with missing images. Empty if there are no tables to write or verify.

    Raises:
        ConfigError: if a file cannot be read, if a folder contains none of the images, or if `verify` finds a table
            that no longer fits the annotation files or the image folder.
    """
    assert config.cache_dir is not None, "tables need data.cache_dir"
    tables = {source_table(source, config.cache_dir): source for source in _annotated_sources(config)}
    num_samples = num_verified = 0
    missing: list[str] = []
    for path, source in tqdm(tables.items(), desc="reading annotations", unit="file", disable=None):
        made_from = describe_files(annotation_files(source))
        samples = read_annotations(source)
        num_missing, example = count_missing_images(samples)
        if num_missing:
            of_all = f"{num_missing:,} of {len(samples.paths):,} images are missing"
            missing.append(f"{samples.annotations}: {of_all} in {samples.images.path}, such as {example}")
        num_samples += len(samples)
        if verify and os.path.exists(path):
            _verify(StoredAnnotations(path, annotation_files(source), source.images), samples, path)
            num_verified += 1
        else:
            write_table(samples, path, made_from)
    if not tables:
        return ""
    actions = f"{len(tables) - num_verified} tables written, {num_verified} verified"
    return "\n".join([f"{len(tables)} annotation files with {num_samples:,} samples: {actions}", *missing])


def _annotated_sources(config: DataConfig) -> list[SourceConfig]:
    streams = (config.images, config.pairs)
    sources = [source for stream in streams for source in stream.sources]
    return [source for source in sources if source.images and not source.has_task_format]


def _verify(stored: StoredAnnotations, read: AnnotatedImages, path: str) -> None:
    columns = (
        (stored.image_numbers, read.image_numbers),
        (stored.paths.ends, read.paths.ends),
        (stored.paths.text, read.paths.text),
        (stored.captions.ends, read.captions.ends),
        (stored.captions.text, read.captions.text),
    )
    if all(np.array_equal(then, now) for then, now in columns) and stored.skipped == read.skipped:
        return
    raise ConfigError(
        f"data: {read.annotations} or the images in {read.images.path} no longer fit the table {path}. If the change "
        "is meant, run `beit3 prepare index` without --verify; otherwise fetch them again."
    )
