"""The packed, modality-major micro-batch: the one contract between data, model, pipeline and loss.

A micro-batch is one stream of T tokens without padding, in this order:

    [ images | images of pairs | texts of pairs | texts ]
      0      a                 b                c       T

so that every expert works on a slice (`PackedBatch.expert_slices`) and every sequence is one or two row ranges
(`PackedBatch.sequence_ranges`): a pair is an image range and a text range. Sequences are numbered images, pairs, texts.
"""

# I images, P pairs, X texts, B = I + P images with pixels, Q = I + P + X sequences, N patches an image,
# S tokens of all texts, M masked tokens, T packed rows, L layers.

import dataclasses
import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from beit3_ds.layout import KeptSequences, PickedRows, RowLayout, SequenceLayout

ImageViews = Literal["both", "model", "tokenizer"]
"""Which views of an image a rank needs: the first stage of a pipeline the model's, the last the visual tokenizer's."""

LOSS_TERMS = ("image_mim", "text_mlm", "pair_mim", "pair_mlm")
"""The four terms of the loss, in the order of every four-vector of sums and counts."""


@dataclass(frozen=True, kw_only=True)
class PackedBatch(RowLayout):
    """One micro-batch of images, pairs and texts; any of the three may be absent."""

    num_images: int
    """Images without texts, I."""
    num_pairs: int
    """Images with captions, P."""
    caption_lengths: tuple[int, ...]
    """Tokens of each caption, BOS and EOS included; P values."""
    text_lengths: tuple[int, ...]
    """Tokens of each text, BOS and EOS included; X values."""
    pixels: Tensor | None
    """The model's view, (B, 3, image_size, image_size) float32 in [-1, 1]; images first, then those of pairs. None
    where another stage of a pipeline embeds."""
    tokenizer_pixels: Tensor | None
    """The visual tokenizer's view of the same crops, (B, 3, s, s) float32 in [-1, 1]. None where another stage of a
    pipeline needs the codes."""
    patch_mask: Tensor
    """True where a patch is masked, (B, N) bool."""
    token_ids: Tensor
    """Corrupted ids of all captions, then of all texts, (S,) int64."""
    masked_tokens: Tensor
    """Positions in `token_ids` to be predicted, ascending, (M,) int64."""
    target_ids: Tensor
    """The original ids there, (M,) int64."""
    drop_path: Tensor | None = None
    """Factor of every sequence's two branches in every layer, (Q, L, 2) float32: 0 where the branch is dropped, else
    1 / (1 - rate). None: nothing is dropped (evaluation, or a rate of 0)."""
    visual_targets: Tensor | None = None
    """Codes of the masked patches in row order, (patch_mask.sum(),) int64; filled by `with_visual_codes`."""
    sample_names: tuple[str, ...] = ()
    """Where each sequence came from, for logs and error messages; Q values or none."""
    sources: dict[str, int] = field(default_factory=dict)
    """Number of each stream's only source in the batch, by the stream's name; empty if sources may mix."""

    def __post_init__(self) -> None:
        num_pixels = self.num_images + self.num_pairs
        num_tokens = sum(self.caption_lengths) + sum(self.text_lengths)
        assert len(self.caption_lengths) == self.num_pairs, "one caption length a pair"
        assert self.pixels is None or self.pixels.shape[0] == num_pixels, "one model's view an image"
        assert self.patch_mask.shape[0] == num_pixels, "one mask an image"
        assert self.token_ids.shape == (num_tokens,), "text lengths must add up to the tokens"
        assert self.masked_tokens.shape == self.target_ids.shape, "one target a masked token"
        assert not self.sample_names or len(self.sample_names) == self.num_sequences, "one name a sequence"

    @property
    def num_texts(self) -> int:
        """Texts without images, X."""
        return len(self.text_lengths)

    @property
    def num_sequences(self) -> int:
        """Images, pairs and texts, Q."""
        return self.num_images + self.num_pairs + self.num_texts

    @property
    def image_length(self) -> int:
        """Rows of one image: CLS and its patches."""
        return 1 + self.patch_mask.shape[1]

    @cached_property
    def layout(self) -> SequenceLayout:
        """Where sequences and experts' rows are."""
        return SequenceLayout(self.num_images, self.caption_lengths, self.text_lengths, self.image_length)

    @property
    def boundaries(self) -> tuple[int, int, int, int]:
        """The row numbers (a, b, c, T) of the module's picture."""
        return self.layout.boundaries

    @property
    def sequence_ranges(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Row ranges [start, stop) of each sequence: one, or two for a pair (image, then caption)."""
        return self.layout.sequence_ranges

    def kept_sequences(self, layer: int, branch: int) -> KeptSequences:
        """The sequences of which stochastic depth does not drop a branch; waits for the device, once a micro-batch.

        Args:
            layer: from 0.
            branch: 0 for attention, 1 for the FFN.
        """
        return self.layout.keep(self._keeps[:, layer, branch].tolist())

    @cached_property
    def dropped_rows(self) -> list[list[int]]:
        """Rows that are dropped, by layer and branch, L x 2; waits for the device, once a micro-batch."""
        lengths = [sum(stop - start for start, stop in ranges) for ranges in self.sequence_ranges]
        lengths_Q = torch.tensor(lengths, dtype=torch.int64)
        rows: list[list[int]] = torch.where(self._keeps, 0, lengths_Q[:, None, None]).sum(0).tolist()
        return rows

    @cached_property
    def _keeps(self) -> Tensor:
        assert self.drop_path is not None, "nothing is dropped"
        return self.drop_path.cpu() != 0

    @cached_property
    def row_sequence(self) -> Tensor:
        """The sequence that every row belongs to, (T,) int64."""
        sequences = torch.arange(self.num_sequences)
        num_pixels = self.num_images + self.num_pairs
        lengths = torch.tensor([*self.caption_lengths, *self.text_lengths], dtype=torch.int64)
        image_rows = sequences[:num_pixels].repeat_interleave(self.image_length)
        text_rows = sequences[self.num_images :].repeat_interleave(lengths)
        return torch.cat([image_rows, text_rows]).to(self.token_ids.device)

    @cached_property
    def text_positions(self) -> Tensor:
        """Position of every token in its own text, from 0, (S,) int64."""
        lengths = torch.tensor([*self.caption_lengths, *self.text_lengths], dtype=torch.int64)
        starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        return (torch.arange(len(starts)) - starts).to(self.token_ids.device)

    @cached_property
    def masked_rows(self) -> PickedRows:
        """The rows that the heads read: masked patches, those of images first, then masked tokens, captions first."""
        image, patch = self.patch_mask.nonzero(as_tuple=True)
        rows = torch.cat([image * self.image_length + 1 + patch, self.masked_tokens + self.boundaries[1]])
        image_mim, text_mlm, pair_mim, pair_mlm = self.num_masked
        return PickedRows(rows, (image_mim, pair_mim, pair_mlm, text_mlm))

    @cached_property
    def num_masked(self) -> tuple[int, int, int, int]:
        """Masked positions of each of `LOSS_TERMS` in this micro-batch."""
        image = int(self.patch_mask[: self.num_images].sum())
        pair = int(self.patch_mask[self.num_images :].sum())
        caption = int((self.masked_tokens < sum(self.caption_lengths)).sum())
        return image, len(self.masked_tokens) - caption, pair, caption

    def with_visual_codes(self, codes: Tensor) -> "PackedBatch":
        """Returns the batch with the targets of its masked patches.

        Args:
            codes: the visual tokenizer's codes of `tokenizer_pixels`, (B, N) int64.
        """
        assert codes.shape == self.patch_mask.shape, f"codes {tuple(codes.shape)} do not fit {self.patch_mask.shape}"
        return dataclasses.replace(self, visual_targets=codes[self.patch_mask])

    def without_pixels(self) -> "PackedBatch":
        """Returns the batch without pixels, as stages of a pipeline see it that neither embed nor predict."""
        return dataclasses.replace(self, pixels=None, tokenizer_pixels=None)

    def fingerprint(self) -> str:
        """A digest of all but the pixels, to see whether two ranks read the same samples, masks and draws."""
        digest = hashlib.sha256(repr((self.num_images, self.caption_lengths, self.text_lengths)).encode())
        digest.update("\n".join(self.sample_names).encode())
        for tensor in (self.patch_mask, self.token_ids, self.masked_tokens, self.target_ids, self.drop_path):
            if tensor is not None:
                digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def as_value(self) -> dict[str, Any]:
        """Returns all fields as `parallel.HostGroup` sends them: numbers, strings, tuples and host tensors."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_value(cls, value: dict[str, Any]) -> "PackedBatch":
        """Rebuilds a batch from the fields of `as_value`."""
        return cls(**value)

    def to(self, device: torch.device) -> "PackedBatch":
        """Returns the batch with all its tensors on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What one rank processes in one optimizer step."""

    step: int
    """The optimizer step, from 0."""
    micro_batches: tuple[PackedBatch, ...]
    """This rank's micro-batches; every rank has the same number."""
    broken_records: dict[str, str] = field(default_factory=dict)
    """Records of this rank's share that could not be read, by name, each with a line that says what is wrong. Their
    slots stay empty."""

    def without_pixels(self) -> "StepBatch":
        """Returns the step with `PackedBatch.without_pixels` micro-batches."""
        return dataclasses.replace(self, micro_batches=tuple(batch.without_pixels() for batch in self.micro_batches))

    def fingerprint(self) -> str:
        """A digest of all but the pixels; see `PackedBatch.fingerprint`."""
        return f"step {self.step}: {[batch.fingerprint() for batch in self.micro_batches]}"

    def as_value(self) -> dict[str, Any]:
        """Returns all fields as `parallel.HostGroup` sends them."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"micro_batches": tuple(batch.as_value() for batch in self.micro_batches)}

    @classmethod
    def from_value(cls, value: dict[str, Any]) -> "StepBatch":
        """Rebuilds a step from the fields of `as_value`."""
        batches = tuple(PackedBatch.from_value(batch) for batch in value["micro_batches"])
        return cls(**value | {"micro_batches": batches})
