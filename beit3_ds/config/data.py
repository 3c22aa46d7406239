"""The three data streams, masking, augmentation, and the text tokenizer."""

from dataclasses import dataclass

from beit3_ds.config.strict import ConfigError, check_range
from beit3_ds.config.visual_tokenizer import VisualTokenizerConfig


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """One of the three streams: where its samples lie and how many of them make up a step."""

    train: tuple[str, ...]
    """Files or glob patterns, from the working directory. Images and pairs: WebDataset tar shards; texts: UTF-8 files,
    one paragraph a line, a blank line between documents or paragraphs."""
    heldout: tuple[str, ...] = ()
    """The same for the held-out loss; empty means that the stream is not evaluated."""
    samples_per_step: int
    """Samples of this stream in one optimizer step, over all ranks (paper: 2048). 0 leaves the stream out."""

    def __post_init__(self) -> None:
        check_range("data.*.samples_per_step", self.samples_per_step, 0)
        if self.samples_per_step and not self.train:
            raise ConfigError("data: a stream with samples_per_step > 0 needs at least one file in 'train'.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read and how it is masked (paper section 2.2 and 2.3)."""

    images: StreamConfig
    """Images without texts: MIM only."""
    pairs: StreamConfig
    """Images with captions: MIM and MLM."""
    texts: StreamConfig
    """Texts alone: MLM only."""
    text_length: int = 128
    """Tokens of a text sample at most, BOS and EOS included. The paper is silent; 128 is near an image's length."""
    pair_text_length: int = 64
    """Tokens of a caption at most, BOS and EOS included (the released models' fine-tuning length)."""
    image_mask_ratio: float = 0.4
    """Share of an image's patches that block-wise masking hides, exactly (paper: 40%)."""
    text_mask_ratio: float = 0.15
    """Share of a text's tokens to be predicted (paper: 15%)."""
    pair_text_mask_ratio: float = 0.5
    """Share of a caption's tokens to be predicted (paper: 50%)."""
    min_crop_scale: float = 0.2
    """Smallest share of the area that the random resized crop keeps (BEiT v2's value; the paper is silent)."""
    color_jitter: float = 0.4
    """Strength of brightness, contrast and saturation jitter (paper: "color jittering"; BEiT's value)."""
    flip_probability: float = 0.5
    """Horizontal flip of images without texts."""
    pair_flip_probability: float = 0.5
    """Horizontal flip of images with captions. The paper's augmentation flips; 0 keeps "left" and "right" true."""
    prepared_dir: str | None = None
    """Folder of what `beit3 prepare` writes: shard indices and token files. None scans shards and tokenises texts at
    the start of every run, in memory: fit for a small corpus."""
    num_workers: int = 2
    """Processes that prepare batches, for each rank; 0 prepares them in the training process."""
    prefetch_steps: int = 2
    """Steps that each worker prepares ahead; memory is workers x prefetch_steps x one rank's step."""
    max_broken_records: int = 100
    """Unreadable records that are counted and left out before the run stops with their list."""

    def __post_init__(self) -> None:
        for name in ("image_mask_ratio", "text_mask_ratio", "pair_text_mask_ratio"):
            check_range(f"data.{name}", getattr(self, name), 0.01, 0.99)
        for name in ("min_crop_scale", "flip_probability", "pair_flip_probability"):
            check_range(f"data.{name}", getattr(self, name), 0, 1)
        for name in ("text_length", "pair_text_length"):
            check_range(f"data.{name}", getattr(self, name), 4)
        check_range("data.color_jitter", self.color_jitter, 0, 1)
        check_range("data.num_workers", self.num_workers, 0)
        check_range("data.prefetch_steps", self.prefetch_steps, 1)
        check_range("data.max_broken_records", self.max_broken_records, 0)

    def streams(self) -> dict[str, StreamConfig]:
        """The streams by name, in the order of the packed batch."""
        return {"images": self.images, "pairs": self.pairs, "texts": self.texts}


@dataclass(frozen=True, kw_only=True)
class TextTokenizerConfig:
    """SentencePiece model of the texts, and how `beit3 train-text-tokenizer` makes it."""

    path: str
    """The .spm file, read by pretraining and written by training the tokenizer."""
    vocab_size: int = 64000
    """Pieces that SentencePiece learns, its own <unk>, <s> and </s> included (reference: 64000, so <mask> is 64001)."""
    character_coverage: float = 0.9995
    """Share of the characters that get a piece of their own."""
    max_sentences: int = 10_000_000
    """Lines sampled from the corpus for training."""

    def __post_init__(self) -> None:
        check_range("tokenizers.text.vocab_size", self.vocab_size, 8)
        check_range("tokenizers.text.character_coverage", self.character_coverage, 0.9, 1)


@dataclass(frozen=True, kw_only=True)
class TokenizersConfig:
    """The two tokenizers of a run."""

    text: TextTokenizerConfig
    """Words to ids."""
    visual: VisualTokenizerConfig
    """Patches to codes."""
