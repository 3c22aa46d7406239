"""Defines the configuration of the three data streams, their augmentation, and the tokenizers."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from beit3_ds.config.numbers import Count, Range, Seconds, Share
from beit3_ds.config.source_names import short_source_names
from beit3_ds.config.strict import ConfigError, PathString
from beit3_ds.config.visual_tokenizer import VisualTokenizerConfig

ANNOTATION_FORMATS = ("coco", "visual_genome", "sbu", "conceptual_captions", "conceptual_12m")
"""Formats of captioned images whose path is an annotation file; the images are in a folder."""

IMAGE_FORMATS = ("tar", "folder", *ANNOTATION_FORMATS)
"""Formats of images with or without captions. Further formats belong to tasks (`Task.formats`)."""

Split = Literal["train", "validation", "test"]
"""Parts of a stream's sources; `test` is read by `beit3 evaluate` alone."""

TextLength = Annotated[int, Range(4, 2**18)]
"""Tokens per text; the minimum is BOS, EOS, one masked and one visible token."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Configures a source of samples: files of one format. In JSON, a string is short for {"path": string}."""

    SHORTHAND: ClassVar[str] = "path"

    path: PathString
    """File, folder or glob pattern, relative to the working directory; `~` is the home folder."""
    format: str | None = None
    """Format of images and pairs. `tar`: WebDataset shards; `folder`: image files with captions next to them; `coco`,
    `visual_genome` (path: region_descriptions.json, with image_data.json next to it), `sbu`, `conceptual_captions` and
    `conceptual_12m`: the corpora's own annotation files (beit3_ds/data/images/annotations.py). None: `folder` for a
    folder, else `tar`. Must be None for texts, whose format follows from their names (beit3_ds/data/text/formats.py):
    JSON objects with `text`, or plain UTF-8, compressed or not. Other tasks than pretraining have formats of their own
    (docs/tasks.md)."""
    images: PathString = ""
    """Folder of the images that an annotation file names, or a pattern of tars that hold them (`coco/*.tar`); only for
    formats with such a file."""
    annotations: PathString = ""
    """Second annotation file, such as the answers to the questions in `path`; only for a task's formats."""
    split: str = ""
    """Part of the file to read, such as "val" of a Karpathy split; empty reads all. Only for a task's formats."""
    weight: Annotated[float, Range(1e-6, 1e6)] | None = None
    """Share of this source in the samples of its stream, relative to the weights of the other sources. If no source has
    a weight, sources count by size, so every sample of the stream comes once per epoch."""

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
        """Returns whether the format belongs to a task, so that only the task reads the files."""
        return self.format is not None and self.format not in IMAGE_FORMATS

    def paths(self) -> tuple[str, ...]:
        """Returns all files, folders and patterns that the source names."""
        return tuple(path for path in (self.path, self.annotations, self.images) if path)


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Configures one of the three streams of samples: its sources, and its samples per step."""

    train: tuple[SourceConfig, ...] = ()
    """Training sources; may be empty if the stream is left out. Without weights they form one set, which is shuffled as
    a whole. With weights each source has its own epochs, and the weights decide on the source of each sample."""
    validation: tuple[SourceConfig, ...] = ()
    """Sources of the validation loss, without weights: samples are spread over the sources by size. If empty, the
    stream is not evaluated."""
    test: tuple[SourceConfig, ...] = ()
    """Sources that only `beit3 evaluate --split test` reads, without weights."""
    samples_per_step: Annotated[int, Range(0, 2**24)]
    """Samples of this stream in one optimizer step, over all ranks (paper: 2048). 0 leaves the stream out."""

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
        """Returns the weights of the training sources; None if sources have no weights and count by size."""
        weights = tuple(source.weight for source in self.train if source.weight is not None)
        return weights or None


def _no_stream() -> StreamConfig:
    return StreamConfig(samples_per_step=0)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Configures the data of a run: its streams, augmentation, order and reading (paper sections 2.2 and 2.3)."""

    images: StreamConfig = field(default_factory=_no_stream)
    """Images without texts, for MIM. A stream without a section is left out."""
    pairs: StreamConfig = field(default_factory=_no_stream)
    """Images with captions, for MIM and MLM."""
    texts: StreamConfig = field(default_factory=_no_stream)
    """Texts without images, for MLM."""
    text_length: TextLength = 128
    """Maximum tokens per text sample, BOS and EOS included. The paper is silent; 128 is near the length of an image."""
    document_separator: bool = True
    """Whether EOS separates documents that share a sequence of `texts`, as in RoBERTa. False joins them directly. A
    document is a JSON object, or in plain text the lines between two blank lines."""
    pair_text_length: TextLength = 64
    """Maximum tokens per caption, BOS and EOS included (the fine-tuning length of the released models)."""
    min_crop_scale: Annotated[float, Range(0, 1, above=True)] = 0.2
    """Smallest share of the image's area that a random crop keeps (BEiT v2's value; the paper is silent)."""
    color_jitter: Share = 0.4
    """Strength of brightness, contrast and saturation jitter (paper: "color jittering"; BEiT's value)."""
    flip_probability: Share = 0.5
    """Probability of a horizontal flip of images without texts."""
    pair_flip_probability: Share = 0.5
    """Probability of a horizontal flip of images with captions. The paper flips them; 0 keeps "left" and "right"
    true."""
    rand_augment_operations: Annotated[int, Range(0, 100)] = 0
    """Random operations per training image (RandAugment; 2 in the reference's fine-tuning); pretraining has none."""
    rand_augment_magnitude: Annotated[float, Range(0, 10)] = 7.0
    """Strength of these operations, from 0 to 10."""
    random_erasing: Share = 0.0
    """Probability that noise replaces a rectangle of a training image; pretraining ignores it."""
    cache_dir: PathString | None = None
    """Folder to which `beit3 prepare` writes shard indices, tables of annotations and token files. None scans shards,
    parses annotations and tokenizes texts in memory at the start of every run, which suits a small corpus."""
    order: Literal["shuffled", "shard_sequential"] = "shuffled"
    """Shuffling of an epoch. `shuffled`: as a whole, so reads jump between shards. `shard_sequential`: blocks of
    `block_samples` neighbours are visited in a shuffled order, and `window_blocks` blocks at a time are shuffled
    together. Then few shards are in use at once, which suits storage that reads ahead, and corpora with more shards
    than a process may keep open. The cost is randomness: window_blocks x block_samples consecutive samples come from
    window_blocks places in the corpus. Do not use it if neighbours are alike, as in shards sorted by class."""
    block_samples: Annotated[int, Range(1, 2**30)] = 1000
    """Neighbouring samples per block with `order` "shard_sequential"; at most the samples of a shard."""
    window_blocks: Annotated[int, Range(1, 2**30)] = 64
    """Blocks that are shuffled together with `order` "shard_sequential"; they should last for many steps."""
    num_workers: Annotated[int, Range(0, 1024)] = 2
    """Processes per rank that prepare steps; 0 prepares them in the training process."""
    prefetch_steps: Annotated[int, Range(1, 1024)] = 2
    """Steps that each worker prepares ahead, unless `prefetch_gib` allows fewer."""
    prefetch_gib: Annotated[float, Range(0.001, 2**20)] = 8.0
    """Shared memory for the prefetched steps of one rank, in GiB. If num_workers x prefetch_steps steps take more,
    fewer steps are prepared ahead, by fewer workers if necessary. By default 8 ranks of a node take at most 64 GiB,
    half the memory of a node with 128 GiB; /dev/shm usually has half of the memory."""
    max_open_files: Annotated[int, Range(1, 2**20)] = 4096
    """Maximum number of shards that each process keeps open, so that reading a record opens no file. Worker processes
    raise their limit (`ulimit -n`) to twice this number, as far as the hard limit allows. A process uses at most half
    of its limit."""
    timeout_seconds: Seconds = 600
    """Longest wait of a rank for the data of one step or one validation batch, in seconds. Then the run saves, names
    the awaited data, and ends. Ten minutes are about a hundred times the time to read a step, and less than
    parallel.timeout_seconds, after which the ranks that wait for this one end. A worker that dies, or is stopped for 10
    seconds, is replaced before that."""
    max_broken_records: Count = 100
    """Maximum number of broken records that a run leaves out; with more it ends and lists them. A record counts once
    per run, even if several ranks read it, or one rank reads it again, or the run restarts."""

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
        """Returns whether a step or the validation samples hold images, so that the run needs the visual tokenizer."""
        return self.images.is_used or self.pairs.is_used

    @property
    def has_texts(self) -> bool:
        """Returns whether a step or the validation samples hold texts or captions, which need the text tokenizer."""
        return self.texts.is_used or self.pairs.is_used

    def streams(self) -> dict[str, StreamConfig]:
        """Returns the streams by name, in the order of the packed batch."""
        return {"images": self.images, "pairs": self.pairs, "texts": self.texts}

    def source_names(self, split: Split = "validation") -> dict[str, list[str]]:
        """Returns short names of the sources of each stream in a split (`short_source_names`)."""
        streams = self.streams().items()
        return {name: short_source_names([source.path for source in getattr(of, split)]) for name, of in streams}


@dataclass(frozen=True, kw_only=True)
class TextTokenizerConfig:
    """Configures the SentencePiece model of the texts, and how `beit3 train-text-tokenizer` trains it."""

    path: PathString = ""
    """Path of the .spm file, which `beit3 train-text-tokenizer` writes and pretraining reads. May be empty for a run
    without texts and pairs."""
    vocab_size: Annotated[int, Range(8, 2**24 - 2)] = 64000
    """Pieces that SentencePiece learns, its own <unk>, <s> and </s> included (reference: 64000, so <mask> is 64001)."""
    character_coverage: Annotated[float, Range(0.9, 1)] = 0.9995
    """Share of the characters in the corpus that get a piece of their own."""
    max_sentences: Annotated[int, Range(101, 2**40)] = 10_000_000
    """Lines drawn from the whole corpus for training, with equal probability; only these are kept in memory.
    SentencePiece needs more than 100."""


@dataclass(frozen=True, kw_only=True)
class TokenizersConfig:
    """Configures the two tokenizers of a run."""

    text: TextTokenizerConfig = field(default_factory=TextTokenizerConfig)
    """Turns words into ids; may be left out of a run without texts and pairs."""
    visual: VisualTokenizerConfig = field(default_factory=VisualTokenizerConfig)
    """Turns patches into codes; may be left out of a run without images and pairs."""
