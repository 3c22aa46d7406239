"""Opens the images, pairs and texts of pretraining, and reads, crops, tokenizes and masks each sample."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from beit3_ds.config import RunConfig, SourceConfig
from beit3_ds.config.data import Split
from beit3_ds.data.files.descriptors import OpenFiles
from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.files.records import BrokenRecordError, Skipped
from beit3_ds.data.images.augmentation import CenterViews, ViewTransform, build_augmentation
from beit3_ds.data.samples import ImageSourceSamples, SampleKey, Stream
from beit3_ds.data.sources import ConcatSources, check_no_sample_twice, open_images
from beit3_ds.data.text.sequences import TextSequences
from beit3_ds.tasks.pretraining.config import pretraining_config
from beit3_ds.tasks.pretraining.masking import TextMasking, block_mask
from beit3_ds.tasks.pretraining.packing import ImageSample, PairSample, TextSample
from beit3_ds.tokenizers.text import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class ImageSamples(ImageSourceSamples):
    """Prepares the images of one source for masked image modeling."""

    grid_size: int
    """Number of patches along one side of an image."""
    num_masked: int
    """Number of patches to mask per image."""

    def prepare(self, index: int, key: SampleKey) -> ImageSample:
        """Reads, augments and masks sample `index` of the source; `key` seeds the augmentation and the mask.

        Raises:
            BrokenRecordError: if the image cannot be read.
        """
        return self.augment(self.read(index), index, key)

    def augment(self, image: Image.Image, index: int, key: SampleKey) -> ImageSample:
        """Augments and masks the decoded image of sample `index`; `key` seeds the augmentation and the mask."""
        return ImageSample(
            name=self.source.name(index),
            views=self.views(image, key.rng("augmentation")),
            patch_mask=block_mask(self.grid_size, self.num_masked, key.rng("patch mask")),
        )


@dataclass(frozen=True, kw_only=True)
class PairSamples:
    """Prepares the image-text pairs of one source for masked vision-language modeling."""

    is_last_open: ClassVar[bool] = False

    images: ImageSamples
    """Prepares the images of the source; `images.source` also reads the captions."""
    tokenizer: TextTokenizer
    """Converts captions to token ids."""
    length: int
    """Maximum number of tokens per caption, with BOS and EOS; longer captions are cut off."""
    masking: TextMasking
    """Masks tokens of captions."""

    def __len__(self) -> int:
        """Returns the number of samples of the source, including broken samples."""
        return len(self.images)

    def files(self) -> Iterable[SourceFile]:
        """Returns each source file's name, size in bytes and number of samples."""
        return self.images.files()

    def identity(self, index: int) -> bytes:
        """Returns the sample's name without folders, as bytes; a resumed run recognises samples by these bytes."""
        return self.images.identity(index)

    def name(self, index: int) -> str:
        """Returns the sample's file and the sample's name in the file, for messages."""
        return self.images.name(index)

    def skipped(self) -> dict[str, Skipped]:
        """Returns the number of skipped files, members and rows for each reason, with an example."""
        return self.images.skipped()

    def prepare(self, index: int, key: SampleKey) -> PairSample:
        """Reads, augments and masks sample `index` of the source; `key` seeds the augmentation and the masks.

        Raises:
            BrokenRecordError: if the image or the caption cannot be read, or the caption has no tokens.
        """
        source, tokenizer = self.images.source, self.tokenizer
        image, text = source.pair(index, self.images.views.min_side)
        pieces = tokenizer.encode(text)[: self.length - 2]
        name = source.name(index)
        if not pieces:
            raise BrokenRecordError(f"{name}: the caption holds nothing that the tokenizer keeps")
        ids = np.array([tokenizer.bos_id, *pieces, tokenizer.eos_id], dtype=np.int64)
        caption = _masked_text(name, ids, self.masking, key)
        return PairSample(image=self.images.augment(image, index, key), caption=caption)


@dataclass(frozen=True, kw_only=True)
class TextSamples:
    """Prepares the texts of one source for masked language modeling."""

    is_last_open: ClassVar[bool] = True

    sequences: TextSequences
    """Tokenized texts."""
    masking: TextMasking
    """Masks tokens of texts."""

    def __len__(self) -> int:
        """Returns the number of samples of the source."""
        return len(self.sequences)

    def files(self) -> Iterable[SourceFile]:
        """Returns each source file's name, size in bytes and number of samples."""
        return self.sequences.files()

    def identity(self, index: int) -> bytes:
        """Returns the sample's token ids as bytes; a resumed run recognises samples by these bytes."""
        return self.sequences[index].tobytes()

    def name(self, index: int) -> str:
        """Returns the sample's file and the sample's number in the file, for messages."""
        return self.sequences.name(index)

    def skipped(self) -> dict[str, Skipped]:
        """Returns the number of skipped lines or files for each reason, with an example."""
        found = {"line that is no text": self.sequences.broken, "file without text": self.sequences.empty}
        return {reason: Skipped(len(names), names[0]) for reason, names in found.items() if names}

    def prepare(self, index: int, key: SampleKey) -> TextSample:
        """Reads and masks sample `index` of the source; `key` seeds the mask."""
        return _masked_text(self.sequences.name(index), self.sequences[index], self.masking, key)


def build_streams(config: RunConfig, tokenizer: TextTokenizer | None, split: Split) -> dict[str, Stream]:
    """Opens the samples of a split, by kind ("images", "pairs" or "texts").

    Training images are augmented. Other images are cropped at the center.

    Raises:
        ConfigError: if a file is missing or cannot be read.
    """
    if split == "train":
        return build_train_streams(config, tokenizer)
    return build_evaluation_streams(config, tokenizer, split)


def build_train_streams(config: RunConfig, tokenizer: TextTokenizer | None) -> dict[str, Stream]:
    """Opens the training samples, by kind ("images", "pairs" or "texts").

    Images are augmented. Kinds without samples in a step (`samples_per_step`) are left out.

    Raises:
        ConfigError: if a file is missing or cannot be read.
    """
    data = config.data
    files = OpenFiles(data.max_open_files)
    flips = {"images": data.flip_probability, "pairs": data.pair_flip_probability, "texts": 0.0}
    return {
        name: _build_stream(name, stream.train, config, tokenizer, build_augmentation(config, flips[name]), files)
        for name, stream in data.streams().items()
        if stream.samples_per_step
    }


def build_evaluation_streams(
    config: RunConfig, tokenizer: TextTokenizer | None, split: Split = "validation"
) -> dict[str, Stream]:
    """Opens the validation or test samples, by kind ("images", "pairs" or "texts").

    Images are cropped at the center. Kinds without files are left out.

    Raises:
        ConfigError: if a file is missing or cannot be read.
    """
    views = CenterViews(image_size=config.model.image_size, tokenizer_image_size=config.tokenizers.visual.image_size)
    files = OpenFiles(config.data.max_open_files)
    return {
        name: _build_stream(name, sources, config, tokenizer, views, files)
        for name, stream in config.data.streams().items()
        if (sources := getattr(stream, split))
    }


def _build_stream(
    name: str,
    sources: Sequence[SourceConfig],
    config: RunConfig,
    tokenizer: TextTokenizer | None,
    views: ViewTransform,
    files: OpenFiles,
) -> Stream:
    check_no_sample_twice(sources)
    return Stream(ConcatSources([_build_samples(name, source, config, tokenizer, views, files) for source in sources]))


def _build_samples(
    name: str,
    source: SourceConfig,
    config: RunConfig,
    tokenizer: TextTokenizer | None,
    views: ViewTransform,
    files: OpenFiles,
) -> ImageSamples | PairSamples | TextSamples:
    data = config.data
    if name == "images":
        return _build_images(source, config, views, files)
    assert tokenizer is not None, "a run with texts or pairs has a text tokenizer"
    settings = pretraining_config(config)
    words = tokenizer.word_borders() if settings.text_masking == "whole_word" else None
    if name == "texts":
        sequences = TextSequences(
            [source.path],
            tokenizer,
            data.text_length,
            data.cache_dir,
            max_broken_lines=data.max_broken_records,
            document_separator=data.document_separator,
        )
        masking = TextMasking(ratio=settings.text_mask_ratio, mask_id=tokenizer.mask_id, words=words)
        return TextSamples(sequences=sequences, masking=masking)
    masking = TextMasking(ratio=settings.pair_text_mask_ratio, mask_id=tokenizer.mask_id, words=words)
    images = _build_images(source, config, views, files)
    return PairSamples(images=images, tokenizer=tokenizer, length=data.pair_text_length, masking=masking)


def _build_images(source: SourceConfig, config: RunConfig, views: ViewTransform, files: OpenFiles) -> ImageSamples:
    data = config.data
    return ImageSamples(
        source=open_images(source, data.cache_dir, files),
        views=views,
        grid_size=config.model.grid_size,
        num_masked=max(1, round(config.model.num_patches * pretraining_config(config).image_mask_ratio)),
    )


def _masked_text(name: str, ids: NDArray[np.int64], masking: TextMasking, key: SampleKey) -> TextSample:
    corrupted, positions = masking(ids, key.rng("token mask"))
    return TextSample(name=name, ids=corrupted, masked_positions=positions, target_ids=ids[positions])
