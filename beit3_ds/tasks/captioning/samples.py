"""Prepares images with captions: one sample per caption in training, one sample per image in an evaluation."""

from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from beit3_ds.config import DataConfig, RunConfig, SourceConfig
from beit3_ds.data.files.descriptors import OpenFiles
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.images.annotated import AnnotatedImages
from beit3_ds.data.images.caption_files import CaptionFormat, read_captions
from beit3_ds.data.images.one_view import PairView, build_pair_view
from beit3_ds.data.images.source import ImageSource
from beit3_ds.data.samples import CaptionedSamples, SampleKey, Split, Stream
from beit3_ds.data.sources import ConcatSources, check_no_image_is_missing, check_no_sample_twice, open_images
from beit3_ds.tasks.pretraining.masking import mask_tokens
from beit3_ds.tokenizers.text import TextTokenizer

CAPTION_FORMATS: tuple[str, ...] = get_args(CaptionFormat)
"""Names of the source formats with several captions per image (`data/images/caption_files.py`)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionSample:
    """Holds an image and its caption with some tokens masked."""

    name: str
    """File of the sample and the sample's name in the file, for messages."""
    sample_index: int
    """Index of the sample in its split, from 0."""
    view: Tensor
    """Image after augmentation or resizing, (3, size, size) float32 in [-1, 1]."""
    ids: NDArray[np.int64]
    """Token ids of the caption after masking, with BOS and EOS, (tokens,)."""
    masked_positions: NDArray[np.int64]
    """Positions of the tokens to predict, ascending, (masked tokens,); empty if the image has no caption."""
    target_ids: NDArray[np.int64]
    """Original token ids at the masked positions, (masked tokens,)."""


@dataclass(frozen=True, kw_only=True)
class CaptionSamples(CaptionedSamples):
    """Prepares the images and masked captions of one source."""

    view: PairView
    """Augments or resizes an image to the model's image size."""
    tokenizer: TextTokenizer
    """Converts captions to token ids."""
    length: int
    """Maximum number of tokens per caption, with BOS and EOS; longer captions are cut off."""
    mask_ratio: float
    """Share of a caption's tokens to mask and predict."""
    may_lack_caption: bool
    """Whether images without captions are valid samples, as in a test split."""

    def prepare(self, index: int, key: SampleKey) -> CaptionSample:
        """Reads sample `index` of the source, and masks its caption; `key` seeds the augmentation and the mask.

        Raises:
            BrokenRecordError: if the image or the caption cannot be read, or the caption has no tokens.
        """
        name, tokenizer = self.name(index), self.tokenizer
        if self.may_lack_caption and not self.captions(index):
            text, image = "", self.source.image(index, self.view.min_side)
        else:
            image, text = self.source.pair(index, self.view.min_side)
        pieces = tokenizer.encode(text)[: self.length - 2]
        if text and not pieces:
            raise BrokenRecordError(f"{name}: the caption holds nothing that the tokenizer keeps")
        ids = np.array([tokenizer.bos_id, *pieces, tokenizer.eos_id], dtype=np.int64)
        corrupted, positions = ids, np.empty(0, dtype=np.int64)
        if pieces:
            corrupted, positions = mask_tokens(ids, self.mask_ratio, tokenizer.mask_id, key.rng("token mask"))
        return CaptionSample(
            name=name,
            sample_index=key.index,
            view=self.view.of(text)(image, key.rng("augmentation")),
            ids=corrupted,
            masked_positions=positions,
            target_ids=ids[positions],
        )


def build_stream(config: RunConfig, tokenizer: TextTokenizer, mask_ratio: float, split: Split) -> dict[str, Stream]:
    """Opens the images and captions of a split. Returns {"pairs": samples}, or {} if the split has no sources.

    Training images are augmented. Images of other splits are resized without cropping.

    Raises:
        ConfigError: if a file cannot be read, if an image is missing, or if a training or validation image has no
            captions.
    """
    data, sources = config.data, getattr(config.data.pairs, split)
    if not sources:
        return {}
    check_no_sample_twice(sources)
    files = OpenFiles(data.max_open_files)
    samples = [
        CaptionSamples(
            source=_open_source(source, data, files, split),
            view=build_pair_view(config, split),
            tokenizer=tokenizer,
            length=data.pair_text_length,
            mask_ratio=mask_ratio,
            may_lack_caption=split == "test" and source.format in CAPTION_FORMATS,
        )
        for source in sources
    ]
    return {"pairs": Stream(ConcatSources(samples))}


def _open_source(source: SourceConfig, data: DataConfig, files: OpenFiles, split: Split) -> ImageSource:
    for kind in get_args(CaptionFormat):
        if source.format == kind:
            captioned = read_captions(source.path, source.images, kind, source.split, needs_captions=split != "test")
            opened: AnnotatedImages = captioned if split == "train" else captioned.each_image()
            check_no_image_is_missing(opened)
            return opened
    return open_images(source, data.cache_dir, files)
