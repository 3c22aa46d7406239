"""Defines the configuration of the three data streams, their augmentation, and the tokenizers."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from beit3_ds.config.numbers import Count, Range, Seconds, Share
from beit3_ds.config.source_names import short_source_names
from beit3_ds.config.strict import ConfigError, PathString
from beit3_ds.config.visual_tokenizer import VisualTokenizerConfig

ANNOTATION_FORMATS = ("coco", "visual_genome", "sbu", "conceptual_captions", "conceptual_12m")
"""Formats of captioned images in which a source's path is an annotation file and its images are in a folder."""

IMAGE_FORMATS = ("tar", "folder", *ANNOTATION_FORMATS)
"""All formats of images with or without captions; other formats belong to single tasks (`Task.formats`)."""

Split = Literal["train", "validation", "test"]
"""Split of a stream's sources; only `beit3 evaluate` reads `test`."""

TextLength = Annotated[int, Range(4, 2**18)]
"""Maximum number of tokens per text; at least 4, for BOS, EOS, one masked and one visible token."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Configures a source of samples, which has one format. In JSON, a string S is short for {"path": S}."""

    SHORTHAND: ClassVar[str] = "path"

    path: PathString
    """File, folder or glob pattern, relative to the working directory; `~` is the home folder."""
    format: str | None = None
    """Format of images and pairs. `tar` is WebDataset shards, and `folder` is image files with captions beside them.
    `coco`, `visual_genome` (path of region_descriptions.json, with image_data.json beside it), `sbu`,
    `conceptual_captions` and `conceptual_12m` are the annotation files of these corpora
    (beit3_ds/data/images/annotations.py). Some tasks have formats of their own (docs/tasks.md). None selects `folder`
    for a folder, else `tar`. Texts must have None: the names of their files tell their format
    (beit3_ds/data/text/formats.py)."""
    images: PathString = ""
    """Folder of the images that an annotation file names, or a pattern of tars with these images (`coco/*.tar`)."""
    annotations: PathString = ""
    """Second annotation file, such as the answers to the questions in `path`. Only for a task's own formats."""
    split: str = ""
    """Part of the file to read, such as "val" of a Karpathy split; empty reads the whole file. Only for a task's own
    formats."""
    weight: Annotated[float, Range(1e-6, 1e6)] | None = None
    """Weight of this source: its share of the stream's samples is its weight divided by the sum of all weights. Without
    weights, every sample of the stream is used once per epoch."""

    def __post_init__(self) -> None:
        if self.is_of_task:
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
                    f"data: {self._described} has {key}='{value}', which only formats of "
                    "tasks have, such as vqav2. Remove it, or name the format."
                )

    @property
    def _described(self) -> str:
        return f"source '{self.path}'" + (f" of format {self.format}" if self.format else "")

    @property
    def is_of_task(self) -> bool:
        """Returns whether the source has a task's own format, so that only this task can read it."""
        return self.format is not None and self.format not in IMAGE_FORMATS

    def paths(self) -> tuple[str, ...]:
        """Returns all paths of files and folders, and all patterns, that the source's keys contain."""
        return tuple(path for path in (self.path, self.annotations, self.images) if path)


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Configures one of the three streams of samples: its sources, and its samples per step."""

    train: tuple[SourceConfig, ...] = ()
    """Training sources; may be empty if `samples_per_step` is 0. Without weights, all samples are shuffled as one set.
    With weights, each source has its own epochs, and its weight decides how often it is used."""
    validation: tuple[SourceConfig, ...] = ()
    """Validation sources, without weights. If empty, the stream is not evaluated."""
    test: tuple[SourceConfig, ...] = ()
    """Test sources, which only `beit3 evaluate --split test` reads; they must have no weights."""
    samples_per_step: Annotated[int, Range(0, 2**24)]
    """Number of samples of this stream in one optimizer step, over all ranks (paper: 2048). With 0 the run does not
    train on the stream."""

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
        """Returns whether the run trains on the stream or evaluates it."""
        return bool(self.samples_per_step or self.validation or self.test)

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """Returns the sources of all splits."""
        return (*self.train, *self.validation, *self.test)

    def weights(self) -> tuple[float, ...] | None:
        """Returns the weights of the training sources; None if the sources have no weights."""
        weights = tuple(source.weight for source in self.train if source.weight is not None)
        return weights or None


def _no_stream() -> StreamConfig:
    return StreamConfig(samples_per_step=0)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Configures the data of a run: its streams, augmentation, order and reading (paper sections 2.2 and 2.3)."""

    images: StreamConfig = field(default_factory=_no_stream)
    """Images without texts, for MIM. Leave out the section of any stream that the run does not use."""
    pairs: StreamConfig = field(default_factory=_no_stream)
    """Images with captions, for MIM and MLM."""
    texts: StreamConfig = field(default_factory=_no_stream)
    """Texts without images, for MLM."""
    text_length: TextLength = 128
    """Maximum number of tokens per text sample, BOS and EOS included. The paper does not give it; 128 is near the rows
    of an image."""
    document_separator: bool = True
    """Whether EOS separates documents that share a sequence of the stream "texts", as in RoBERTa; False concatenates
    them without a separator. A document is a JSON object, or in plain text the lines between two blank lines."""
    pair_text_length: TextLength = 64
    """Maximum number of tokens per caption, BOS and EOS included (the value of the released models in fine-tuning)."""
    min_crop_scale: Annotated[float, Range(0, 1, above=True)] = 0.2
    """Smallest share of the image's area that a random crop keeps (BEiT v2's value; the paper does not give it)."""
    color_jitter: Share = 0.4
    """Strength of brightness, contrast and saturation jitter (paper: "color jittering"; BEiT's value)."""
    flip_probability: Share = 0.5
    """Probability of a horizontal flip of images without texts."""
    pair_flip_probability: Share = 0.5
    """Probability of a horizontal flip of images with captions, as in the paper. With 0, "left" and "right" in captions
    stay correct."""
    rand_augment_operations: Annotated[int, Range(0, 100)] = 0
    """Number of random operations per training image (RandAugment; the reference's fine-tuning: 2). Pretraining ignores
    it."""
    rand_augment_magnitude: Annotated[float, Range(0, 10)] = 7.0
    """Strength of RandAugment's operations, from 0 to 10."""
    random_erasing: Share = 0.0
    """Probability that a rectangle of a training image is replaced by noise. Pretraining ignores it."""
    cache_dir: PathString | None = None
    """Folder to which `beit3 prepare` writes shard indices, tables of annotations and token files. With None, every
    start of a run scans shards and keeps annotations and tokens in memory, which suits a small corpus."""
    order: Literal["shuffled", "shard_sequential"] = "shuffled"
    """How an epoch is shuffled. `shuffled` shuffles it as a whole, so reads jump between shards. `shard_sequential`
    reads only a few shards at a time: it shuffles blocks of `block_samples` neighbouring samples, then all samples of
    `window_blocks` consecutive blocks. Use it for storage that reads ahead, and for corpora with more shards than a
    process may keep open. Do not use it if neighbouring samples are alike, as in shards sorted by class."""
    block_samples: Annotated[int, Range(1, 2**30)] = 1000
    """Number of neighbouring samples per block with `order` "shard_sequential"; choose at most the size of a shard."""
    window_blocks: Annotated[int, Range(1, 2**30)] = 64
    """Number of blocks that are shuffled together with `order` "shard_sequential". A window should hold many steps."""
    num_workers: Annotated[int, Range(0, 1024)] = 2
    """Number of processes per rank that prepare steps; with 0 the training process prepares them."""
    prefetch_steps: Annotated[int, Range(1, 1024)] = 2
    """Maximum number of steps that each worker prepares ahead; `prefetch_gib` may allow fewer."""
    prefetch_gib: Annotated[float, Range(0.001, 2**20)] = 8.0
    """Maximum shared memory for the prefetched steps of one rank, in GiB. If num_workers x prefetch_steps steps need
    more, fewer steps are prepared ahead. With the default, 8 ranks of a node take at most 64 GiB, which is the usual
    size of /dev/shm on a node with 128 GiB."""
    max_open_files: Annotated[int, Range(1, 2**20)] = 4096
    """Maximum number of shards that each process keeps open. Worker processes raise their limit of open files (`ulimit
    -n`) to twice this number if they may. A process keeps at most half of its limit open."""
    timeout_seconds: Seconds = 600
    """Longest wait of a rank for the data of one step or one validation batch, in seconds. After that, the run saves a
    checkpoint, prints the name of the missing data, and ends. Choose less than parallel.timeout_seconds. Workers that
    die, or are stopped for 10 seconds, are replaced earlier."""
    max_broken_records: Count = 100
    """Maximum number of broken records that a run skips; with more, the run lists them and ends. A record counts once
    per run."""

    def __post_init__(self) -> None:
        for source in self.texts.sources:
            if source.format is not None and not source.is_of_task:
                raise ConfigError(
                    f"data.texts: source '{source.path}' has the format {source.format}, which is for images. Leave it "
                    f"out: the name of a text decides how it is read (.jsonl or .json, otherwise plain; .gz, .zst)."
                )

    def blocks(self) -> tuple[int, int] | None:
        """Returns the samples per block and blocks per window; None if an epoch is shuffled as a whole."""
        return None if self.order == "shuffled" else (self.block_samples, self.window_blocks)

    @property
    def has_images(self) -> bool:
        """Returns whether the run trains on or evaluates images or pairs; pretraining then needs a visual tokenizer."""
        return self.images.is_used or self.pairs.is_used

    @property
    def has_texts(self) -> bool:
        """Returns whether the run trains on or evaluates texts or pairs, which need a text tokenizer."""
        return self.texts.is_used or self.pairs.is_used

    def streams(self) -> dict[str, StreamConfig]:
        """Returns the streams by name, in the order of the packed batch."""
        return {"images": self.images, "pairs": self.pairs, "texts": self.texts}

    def source_names(self, split: Split = "validation") -> dict[str, list[str]]:
        """Returns a short name of each source of a split (`short_source_names`), by stream."""
        streams = self.streams().items()
        return {name: short_source_names([source.path for source in getattr(of, split)]) for name, of in streams}


@dataclass(frozen=True, kw_only=True)
class TextTokenizerConfig:
    """Configures the SentencePiece model that tokenizes texts, and its training by `beit3 train-text-tokenizer`."""

    path: PathString = ""
    """Path of the .spm file, which `beit3 train-text-tokenizer` writes and pretraining reads. May be empty for a run
    without texts and pairs."""
    vocab_size: Annotated[int, Range(8, 2**24 - 2)] = 64000
    """Number of pieces that SentencePiece learns, including its <unk>, <s> and </s>. The reference has 64000, which
    makes <mask> id 64001."""
    character_coverage: Annotated[float, Range(0.9, 1)] = 0.9995
    """Share of the characters in the corpus that get a piece of their own; the rarest characters get none."""
    max_sentences: Annotated[int, Range(101, 2**40)] = 10_000_000
    """Maximum number of lines to train on, drawn at random from the whole corpus. SentencePiece needs more than 100."""


@dataclass(frozen=True, kw_only=True)
class TokenizersConfig:
    """Configures the two tokenizers of a run."""

    text: TextTokenizerConfig = field(default_factory=TextTokenizerConfig)
    """Tokenizer of texts; a run without texts and pairs may leave it out."""
    visual: VisualTokenizerConfig = field(default_factory=VisualTokenizerConfig)
    """Tokenizer of images; a run without images and pairs may leave it out."""
