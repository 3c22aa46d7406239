"""Opens statements about two images, and packs each statement as two image-text pairs."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ConfigError, ModelConfig, RunConfig
from beit3_ds.config.data import Split
from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.files.records import BrokenRecordError, Skipped
from beit3_ds.data.images.one_view import PairView, build_pair_view
from beit3_ds.data.packing import pack_inputs, stack_views
from beit3_ds.data.samples import SampleKey, Stream
from beit3_ds.data.sources import ConcatSources, check_no_sample_twice
from beit3_ds.tasks.nlvr2.files import Statements, read_nlvr2, read_statement_lines
from beit3_ds.tasks.nlvr2.head import LABELS
from beit3_ds.tokenizers.text import TextTokenizer

INDICES = "indices"
"""Key in `PackedBatch.targets`: index of each sample in its split, (samples,) int64."""
FORMATS = ("nlvr2", "statement_lines")
"""Names of the source formats of this task: NLVR2's published files, and JSON lines."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StatementSample:
    """Holds a tokenized statement, its two images and its label."""

    name: str
    """File and identifier of the sample, for messages."""
    sample_index: int
    """Index of the sample in its split, from 0."""
    views: tuple[Tensor, Tensor]
    """Left and right image after augmentation or resizing, each (3, size, size) float32 in [-1, 1]."""
    ids: NDArray[np.int64]
    """Token ids of the statement, with BOS and EOS, (tokens,)."""
    label: int
    """1 if the statement is true; 0 if it is false or has no label."""


@dataclass(frozen=True, kw_only=True)
class StatementSamples:
    """Prepares the statements of one source."""

    is_last_open: ClassVar[bool] = False

    statements: Statements
    """Statements of the source."""
    view: PairView
    """Augments or resizes an image; the two images of a statement are augmented independently."""
    tokenizer: TextTokenizer
    """Converts statements to token ids."""
    length: int
    """Maximum number of tokens per statement, with BOS and EOS; longer statements are cut off."""

    def __len__(self) -> int:
        """Returns the number of samples of the source, including broken samples."""
        return len(self.statements)

    def files(self) -> Iterable[SourceFile]:
        """Returns the name, size in bytes and number of samples of the source's statements file."""
        return self.statements.files()

    def image_files(self) -> Iterable[str]:
        """Returns the paths of the images of all statements."""
        return self.statements.image_files()

    def identity(self, index: int) -> bytes:
        """Returns the sample's identifier as bytes; a resumed run recognises samples by these bytes."""
        return str(self.statements.identifier(index)).encode("utf-8", "surrogatepass")

    def name(self, index: int) -> str:
        """Returns the file, the line and the identifier of a sample, for messages."""
        return self.statements.name(index)

    def skipped(self) -> dict[str, Skipped]:
        """Returns an empty dictionary, because no line of the statements file is skipped."""
        return self.statements.skipped

    def prepare(self, index: int, key: SampleKey) -> StatementSample:
        """Reads sample `index` of the source, and augments or resizes its images; `key` seeds the augmentation.

        Raises:
            BrokenRecordError: if an image cannot be read, or the statement has no tokens.
        """
        statements, name = self.statements, self.name(index)
        sentence = statements.sentence(index)
        pieces = self.tokenizer.encode(sentence)[: self.length - 2]
        if not pieces:
            raise BrokenRecordError(f"{name}: the sentence holds nothing that the tokenizer keeps")
        view = self.view.of(sentence)
        left, right = (
            view(statements.image(index, side, view.min_side), key.rng(f"augmentation {side}")) for side in (0, 1)
        )
        return StatementSample(
            name=name,
            sample_index=key.index,
            views=(left, right),
            ids=np.array([self.tokenizer.bos_id, *pieces, self.tokenizer.eos_id], dtype=np.int64),
            label=int(statements.label(index) or False),
        )


def build_stream(config: RunConfig, tokenizer: TextTokenizer, split: Split) -> dict[str, Stream]:
    """Opens the statements of a split, as {"pairs": samples}; empty for a split without sources.

    Training images are augmented. Images of other splits are resized without cropping.

    Raises:
        ConfigError: if a file cannot be read, if an image is missing, or if a training sample has no label.
    """
    sources = getattr(config.data.pairs, split)
    if not sources:
        return {}
    check_no_sample_twice(sources)
    samples = []
    for source in sources:
        read = read_statement_lines if source.format == "statement_lines" else read_nlvr2
        if source.annotations or source.split:
            raise ConfigError(
                f"nlvr2: source '{source.path}' has 'annotations' or 'split', which the format {source.format} "
                "does not have. Remove them."
            )
        statements = read(source.path, source.images)
        statements.check_no_image_is_missing()
        if split == "train":
            statements.check_has_labels()
        samples.append(
            StatementSamples(
                statements=statements,
                view=build_pair_view(config, split),
                tokenizer=tokenizer,
                length=config.data.pair_text_length,
            )
        )
    return {"pairs": Stream(ConcatSources(samples), sequences_per_sample=2)}


def pack(
    samples: Sequence[StatementSample],
    drop_path: Tensor | None,
    sources: Mapping[str, int],
    model: ModelConfig,
    embeds: bool = True,
) -> PackedBatch:
    """Packs each statement as two pairs: the left image with the statement, and the right image with the statement.

    Args:
        samples: statements; may be empty. Sample i becomes pairs 2 i and 2 i + 1.
        drop_path: factors of stochastic depth, (2 * samples, layers, 2) float32; None without stochastic depth.
        sources: value of `PackedBatch.sources`.
        model: the model's configuration.
        embeds: whether the batch contains the pixels; a pipeline stage without the embedding layer needs none.
    """
    batch = pack_inputs(
        num_images=0,
        pixels=stack_views([view for sample in samples for view in sample.views], model.image_size) if embeds else None,
        num_patches=model.num_patches,
        captions=[sample.ids for sample in samples for _ in range(2)],
        drop_path=drop_path,
        sample_names=[sample.name for sample in samples for _ in range(2)],
        sources=sources,
    )
    first_rows = batch.layout.first_rows(1, 2)
    targets = {
        LABELS: torch.tensor([sample.label for sample in samples], dtype=torch.int64),
        INDICES: torch.tensor([sample.sample_index for sample in samples], dtype=torch.int64),
    }
    fields: dict[str, Any] = {"head_rows": first_rows.rows, "head_row_counts": first_rows.counts, "targets": targets}
    return dataclasses.replace(batch, term_counts=(len(samples),) * 2, **fields)
