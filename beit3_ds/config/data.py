"""Defines the configuration of the three data streams, the augmentation and the tokenizers."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from beit3_ds.config.numbers import Count, Range, Seconds, Share
from beit3_ds.config.source_names import short_source_names
from beit3_ds.config.strict import ConfigError, PathString
from beit3_ds.config.visual_tokenizer import VisualTokenizerConfig

ANNOTATION_FORMATS = ("coco", "visual_genome", "sbu", "conceptual_captions", "conceptual_12m")
"""Formats of datasets of captioned images. Such a dataset has an annotation file and a folder of images."""

IMAGE_FORMATS = ("tar", "folder", *ANNOTATION_FORMATS)
"""Formats that are not specific to one task, for images and for image-text pairs. `Task.formats` lists the formats that
a task accepts."""

Split = Literal["train", "validation", "test"]
"""Name of a split of the data. Only `beit3 evaluate` reads `test`."""

TextLength = Annotated[int, Range(4, 2**18)]
"""Maximum number of tokens per text. At least 4: BOS, EOS, one masked token and one visible token."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Configures one source of samples. In JSON, the string "S" is short for {"path": "S"}."""

    SHORTHAND: ClassVar[str] = "path"

    path: PathString
    """File, folder or glob pattern, relative to the working directory. A leading `~` is the home folder."""
    format: str | None = None
    """Format of the images or pairs: `tar` for WebDataset shards, or `folder` for image files with captions beside
    them. Corpora with an annotation file have formats of their own: `coco`, `visual_genome`, `sbu`,
    `conceptual_captions` and `conceptual_12m` (beit3_ds/data/images/annotations.py). For `visual_genome`, `path` is
    region_descriptions.json, and image_data.json must be in the same folder. Some tasks add formats (docs/tasks.md).
    None selects `folder` if `path` is a folder, and `tar` otherwise. Must be None for texts, whose format follows from
    the file name (beit3_ds/data/text/formats.py)."""
    images: PathString = ""
    """Folder with the images that the annotation file lists, or a pattern of tar files with these images
    (`coco/*.tar`)."""
    annotations: PathString = ""
    """Annotations that are not in `path`: a second annotation file, such as the answers to the questions in `path`, or
    a folder of label maps. Used only by formats that a task adds."""
    split: str = ""
    """Name of a split, for example "val" to read only this split of a Karpathy file. Some formats of fine-tuning tasks
    need a split (docs/tasks.md). All other formats must have none."""
    weight: Annotated[float, Range(1e-6, 1e6)] | None = None
    """Sampling weight. The source supplies the fraction weight / (sum of all weights) of the stream's samples. Without
    weights, each sample of the stream is used once per epoch."""

    def __post_init__(self) -> None:
        if self.has_task_format:
            return
        if (self.format in ANNOTATION_FORMATS) != bool(self.images):
            raise ConfigError(
                f"data: {self._described} has images='{self.images}'. The formats "
                f"{', '.join(ANNOTATION_FORMATS)} need the folder of their images; {', '.join(IMAGE_FORMATS[:2])} and "
                "texts have none."
            )
        for key in ("annotations", "split"):
            if value := getattr(self, key):
                raise ConfigError(
                    f"data: {self._described} has {key}='{value}', which only task "
                    f"formats such as vqav2 have. Remove {key}, or set 'format'."
                )

    @property
    def _described(self) -> str:
        return f"source '{self.path}'" + (f" of format {self.format}" if self.format else "")

    @property
    def has_task_format(self) -> bool:
        """Returns whether the source's format belongs to a single task, so that other tasks cannot read the source."""
        return self.format is not None and self.format not in IMAGE_FORMATS

    def paths(self) -> tuple[str, ...]:
        """Returns all paths and patterns of the source: `path`, `annotations` and `images`, except empty ones."""
        return tuple(path for path in (self.path, self.annotations, self.images) if path)


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Configures one data stream (images, pairs or texts): its sources and its samples per step."""

    train: tuple[SourceConfig, ...] = ()
    """Training sources; may be empty if `samples_per_step` is 0. Without weights, the samples of all sources are
    shuffled together. With weights, each source has its own epochs."""
    validation: tuple[SourceConfig, ...] = ()
    """Validation sources; must have no weights. If empty, the stream is not evaluated."""
    test: tuple[SourceConfig, ...] = ()
    """Test sources; must have no weights. Only `beit3 evaluate --split test` reads them."""
    samples_per_step: Annotated[int, Range(0, 2**24)]
    """Number of samples of this stream per optimizer step, summed over all ranks (paper: 2048). 0 excludes the stream
    from training."""

    def __post_init__(self) -> None:
        if self.samples_per_step and not self.train:
            raise ConfigError("data: a stream with samples_per_step > 0 needs at least one source in 'train'.")
        without = [source.path for source in self.train if source.weight is None]
        if without and len(without) < len(self.train):
            raise ConfigError(
                f"data: source '{without[0]}' has no weight, but others of its stream have one. Give a weight to every "
                f"source of the stream, or to none (then every sample comes once per epoch)."
            )
        for split in ("validation", "test"):
            for source in getattr(self, split):
                if source.weight is not None:
                    raise ConfigError(
                        f"data: weight={source.weight:g} of {split} source '{source.path}' has no meaning: "
                        f"training.eval_samples are spread over the sources by size. Remove it."
                    )

    @property
    def is_used(self) -> bool:
        """Returns whether the stream is used for training, validation or testing."""
        return bool(self.samples_per_step or self.validation or self.test)

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """Returns the sources of the training, validation and test splits, in this order."""
        return (*self.train, *self.validation, *self.test)

    def weights(self) -> tuple[float, ...] | None:
        """Returns the weights of the training sources, or None if the sources have no weights."""
        weights = tuple(source.weight for source in self.train if source.weight is not None)
        return weights or None


def _no_stream() -> StreamConfig:
    return StreamConfig(samples_per_step=0)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Configures a run's data streams, augmentation, sample order and data workers (paper, sections 2.2 and 2.3)."""

    images: StreamConfig = field(default_factory=_no_stream)
    """Images without texts, for masked image modeling. Unused streams may be left out of the file."""
    pairs: StreamConfig = field(default_factory=_no_stream)
    """Images with captions, for masked image modeling and masked language modeling."""
    texts: StreamConfig = field(default_factory=_no_stream)
    """Texts without images, for masked language modeling."""
    text_length: TextLength = 128
    """Maximum number of tokens per sample of the stream "texts", including BOS and EOS. The paper gives no value."""
    document_separator: bool = True
    """Whether to put EOS between two documents in one sequence of the stream "texts", as RoBERTa does. A document is
    one JSON object, or the lines between two blank lines of a plain text file."""
    pair_text_length: TextLength = 64
    """Maximum number of tokens per caption, including BOS and EOS (64 in the reference's fine-tuning)."""
    min_crop_scale: Annotated[float, Range(0, 1, above=True)] = 0.2
    """Smallest fraction of an image's area that a random crop keeps. The paper gives no value; 0.2 is from BEiT v2."""
    color_jitter: Share = 0.4
    """Strength of the brightness, contrast and saturation jitter. The paper gives no value; 0.4 is from BEiT."""
    flip_probability: Share = 0.5
    """Probability of flipping an image of the stream "images" horizontally."""
    pair_flip_probability: Share = 0.5
    """Probability of flipping an image of the stream "pairs" horizontally. If captions contain "left" or "right", set
    0, because flips make such captions wrong."""
    rand_augment_operations: Annotated[int, Range(0, 100)] = 0
    """Number of RandAugment operations per training image (Microsoft's BEiT-3 code: 2 in fine-tuning). Unused in
    pretraining."""
    rand_augment_magnitude: Annotated[float, Range(0, 10)] = 7.0
    """Strength of the RandAugment operations, from 0 to 10."""
    random_erasing: Share = 0.0
    """Probability of replacing a rectangle of a training image with noise. No effect in pretraining."""
    cache_dir: PathString | None = None
    """Folder to which `beit3 prepare` writes shard indices, annotation tables and token files. With None, each start of
    a run scans the data again and keeps the results in memory, which suits small corpora."""
    order: Literal["shuffled", "shard_sequential"] = "shuffled"
    """How an epoch is shuffled. `shuffled` shuffles all samples together, so reads jump between shards.
    `shard_sequential` cuts the data into blocks of `block_samples` neighbouring samples, and puts the blocks into a
    random order. It then shuffles the samples within each window of `window_blocks` blocks. So only a few shards are
    read at a time. This suits storage with read-ahead, and corpora with more shards than a process may open. Do not use
    `shard_sequential` if neighbouring samples are alike, as in shards sorted by class."""
    block_samples: Annotated[int, Range(1, 2**30)] = 1000
    """Number of neighbouring samples per block if `order` is "shard_sequential", which shuffles whole blocks. Choose no
    more than the number of samples in an average shard."""
    window_blocks: Annotated[int, Range(1, 2**30)] = 64
    """Number of blocks whose samples are shuffled together if `order` is "shard_sequential". Together, these blocks
    should contain the samples of many steps."""
    num_workers: Annotated[int, Range(0, 1024)] = 2
    """Number of data worker processes per rank. With 0, the training process prepares the data."""
    prefetch_steps: Annotated[int, Range(1, 1024)] = 2
    """Maximum number of steps that each data worker prepares ahead. The memory limit `prefetch_gib` may reduce this
    number."""
    prefetch_gib: Annotated[float, Range(0.001, 2**20)] = 8.0
    """Maximum shared memory, in GiB, for the prefetched steps of one rank. If num_workers x prefetch_steps steps need
    more, fewer steps are prefetched. With the default, 8 ranks on a node use at most 64 GiB, which is the usual size of
    /dev/shm on a node with 128 GiB of memory."""
    max_open_files: Annotated[int, Range(1, 2**20)] = 4096
    """Maximum number of shards that each process keeps open. Data workers raise their limit of open files (`ulimit -n`)
    to twice this number if the system permits. A process uses at most half of its limit of open files for shards."""
    timeout_seconds: Seconds = 600
    """Maximum time, in seconds, that a rank waits for the data of one step or one validation batch. After that, the run
    saves a checkpoint, names the missing data and ends. Should be less than parallel.timeout_seconds. Workers that die,
    or are suspended for 10 seconds, are replaced earlier."""
    max_broken_records: Count = 100
    """Maximum number of broken records that a run skips. With more broken records, the run lists them and ends. Each
    record counts once per run."""

    def __post_init__(self) -> None:
        for source in self.texts.sources:
            if source.format is not None and not source.has_task_format:
                raise ConfigError(
                    f"data.texts: source '{source.path}' has the format {source.format}, which is for images. Leave it "
                    f"out: the name of a text decides how it is read (.jsonl or .json, otherwise plain; .gz, .zst)."
                )

    def blocks(self) -> tuple[int, int] | None:
        """Returns `block_samples` and `window_blocks`, or None if `order` is "shuffled"."""
        return None if self.order == "shuffled" else (self.block_samples, self.window_blocks)

    @property
    def has_images(self) -> bool:
        """Returns whether the run uses images or pairs; pretraining then needs a visual tokenizer."""
        return self.images.is_used or self.pairs.is_used

    @property
    def has_texts(self) -> bool:
        """Returns whether the run uses texts or pairs, which need a text tokenizer."""
        return self.texts.is_used or self.pairs.is_used

    def streams(self) -> dict[str, StreamConfig]:
        """Returns the three streams by name, in the order images, pairs, texts."""
        return {"images": self.images, "pairs": self.pairs, "texts": self.texts}

    def check_has(self, split: Split) -> None:
        """Checks that at least one stream has sources for a split.

        Raises:
            ConfigError: if no stream has a source for the split.
        """
        if not any(getattr(stream, split) for stream in self.streams().values()):
            raise ConfigError(
                f"--split {split}: no stream has sources in '{split}' (data.*.{split}). Name the files there, or "
                "evaluate the other split."
            )

    def source_names(self, split: Split = "validation") -> dict[str, list[str]]:
        """Maps the name of each stream to the short names of its sources in one split (see `short_source_names`)."""
        streams = self.streams().items()
        return {name: short_source_names([source.path for source in getattr(of, split)]) for name, of in streams}


@dataclass(frozen=True, kw_only=True)
class TextTokenizerConfig:
    """Configures the SentencePiece text tokenizer and its training by `beit3 train-text-tokenizer`."""

    path: PathString = ""
    """Path of the .spm file. `beit3 train-text-tokenizer` writes the file, and pretraining reads it. May be empty in a
    run without texts and pairs."""
    vocab_size: Annotated[int, Range(8, 2**24 - 2)] = 64000
    """Number of pieces that SentencePiece learns, including <unk>, <s> and </s>. The model's ids also include <pad> and
    <mask>. With the reference's 64000 pieces, ids are 0 to 64001, and <mask> is the last."""
    character_coverage: Annotated[float, Range(0.9, 1)] = 0.9995
    """Fraction of the corpus's characters that the vocabulary covers; the rarest characters become <unk>."""
    max_sentences: Annotated[int, Range(101, 2**40)] = 10_000_000
    """Maximum number of training lines, drawn at random from the whole corpus. SentencePiece needs more than 100 lines.
    """


@dataclass(frozen=True, kw_only=True)
class TokenizersConfig:
    """Configures the text tokenizer and the visual tokenizer of a run."""

    text: TextTokenizerConfig = field(default_factory=TextTokenizerConfig)
    """Text tokenizer; may be left out in a run without texts and pairs."""
    visual: VisualTokenizerConfig = field(default_factory=VisualTokenizerConfig)
    """Visual tokenizer; may be left out in a run with neither images nor pairs."""
