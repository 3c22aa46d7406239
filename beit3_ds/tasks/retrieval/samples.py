"""Prepares images with captions: one random caption per image in training, all captions in an evaluation."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from beit3_ds.config import DataConfig, RunConfig, SourceConfig
from beit3_ds.config.data import Split
from beit3_ds.data.files.descriptors import OpenFiles
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.images.annotated import AnnotatedImages
from beit3_ds.data.images.caption_files import CaptionFormat, read_captions
from beit3_ds.data.images.captioned import EachImage
from beit3_ds.data.images.one_view import PairView, build_pair_view
from beit3_ds.data.images.source import ImageSource
from beit3_ds.data.randomness import sample_rng
from beit3_ds.data.samples import CaptionedSamples, SampleKey, Stream
from beit3_ds.data.sources import ConcatSources, check_no_image_is_missing, check_no_sample_twice, open_images
from beit3_ds.tokenizers.text import TextTokenizer

CAPTION_FORMATS: tuple[str, ...] = get_args(CaptionFormat)
"""Names of the source formats with several captions per image."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RetrievalSample:
    """Holds an image and its captions."""

    name: str
    """File of the sample and the sample's name in the file, for messages."""
    sample_index: int
    """Index of the sample in its split, from 0."""
    view: Tensor
    """Image after augmentation or resizing, (3, size, size) float32 in [-1, 1]."""
    texts: tuple[NDArray[np.int64], ...]
    """Token ids of each caption, with BOS and EOS."""
    image_id: int
    """Hash of the image's path or name; equal for samples of the same image."""
    text_ids: tuple[int, ...]
    """Hash of each caption; equal for equal captions."""


@dataclass(frozen=True, kw_only=True)
class RetrievalSamples(CaptionedSamples):
    """Prepares the images and captions of one source."""

    view: PairView
    """Augments or resizes an image to the model's image size."""
    tokenizer: TextTokenizer
    """Converts captions to token ids."""
    length: int
    """Maximum number of tokens per caption, with BOS and EOS; longer captions are cut off."""
    draws_caption: bool
    """True gives each sample one caption, which depends on the epoch (`caption_of_epoch`). False gives each sample all
    captions of its image."""

    def prepare(self, index: int, key: SampleKey) -> RetrievalSample:
        """Reads sample `index` of the source; `key` determines the caption and seeds the augmentation.

        Raises:
            BrokenRecordError: if the image or a caption cannot be read.
        """
        image, captions = self._read(index)
        if self.draws_caption:
            captions = [captions[caption_of_epoch(len(captions), key)]]
        return RetrievalSample(
            name=self.source.name(index),
            sample_index=key.index,
            view=self.view.of(*captions)(image, key.rng("augmentation")),
            texts=tuple(self._encode(index, caption) for caption in captions),
            image_id=_digest(image_path(self.source, index)),
            text_ids=tuple(map(_digest, captions)),
        )

    def _read(self, index: int) -> tuple[Image.Image, list[str]]:
        if isinstance(self.source, EachImage):
            return self.source.image(index, self.view.min_side), self.source.references(index)
        image, caption = self.source.pair(index, self.view.min_side)
        return image, [caption]

    def _encode(self, index: int, caption: str) -> NDArray[np.int64]:
        tokenizer = self.tokenizer
        pieces = tokenizer.encode(caption)[: self.length - 2]
        if not pieces:
            raise BrokenRecordError(f"{self.source.name(index)}: the caption holds nothing that the tokenizer keeps")
        return np.array([tokenizer.bos_id, *pieces, tokenizer.eos_id], dtype=np.int64)


def caption_of_epoch(count: int, key: SampleKey) -> int:
    """Returns the index of the caption that training uses for an image in one epoch.

    Over `count` epochs, each caption of the image is used once. After that, the captions get a new random order.

    Args:
        count: number of captions of the image.
        key: identifies the sample and the epoch.
    """
    around, place = divmod(key.epoch, count)
    rng = sample_rng(key.seed, "caption", key.stream, around, key.index)
    return int(rng.permutation(count)[place])


def image_path(source: ImageSource, index: int) -> str:
    """Returns the path of a sample's image file. For an image in a tar file, returns the path of the tar file and the
    key of the image.

    The result is equal for all samples of one image.
    """
    if isinstance(source, AnnotatedImages):
        return f"{source.images.path}/{source.paths[source.image_numbers[index]]}"
    return source.name(index)


def open_sources(data: DataConfig, split: Split) -> list[ImageSource]:
    """Opens the sources of a split.

    Raises:
        ConfigError: if a file cannot be read, if an image is missing, or if an image has no captions.
    """
    sources, files = getattr(data.pairs, split), OpenFiles(data.max_open_files)
    check_no_sample_twice(sources)
    return [_open_source(source, data, files) for source in sources]


def build_stream(config: RunConfig, sources: Sequence[ImageSource], tokenizer: TextTokenizer, split: Split) -> Stream:
    """Joins the sources of a split to one sequence of samples.

    A sample is an image with one caption in training, and with all captions otherwise.
    """
    data, is_training = config.data, split == "train"
    return Stream(
        ConcatSources(
            [
                RetrievalSamples(
                    source=source,
                    view=build_pair_view(config, split),
                    tokenizer=tokenizer,
                    length=data.pair_text_length,
                    draws_caption=is_training,
                )
                for source in sources
            ]
        ),
        sequences_per_sample=2,
    )


def _open_source(source: SourceConfig, data: DataConfig, files: OpenFiles) -> ImageSource:
    for kind in get_args(CaptionFormat):
        if source.format == kind:
            captioned = read_captions(source.path, source.images, kind, source.split).each_image()
            check_no_image_is_missing(captioned)
            return captioned
    return open_images(source, data.cache_dir, files)


def _digest(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
