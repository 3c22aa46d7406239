"""Defines the packed micro-batch. Data workers build it; the model, the pipeline and the tasks use it.

A micro-batch is a sequence of T rows, one per token, ordered by modality and without padding:

    [ images | images of pairs | texts of pairs | texts ]
      0      a                 b                c       T

0, a, b and c are the first rows of the four ranges, and T is the number of rows. Each expert works on one range of rows
(`PackedBatch.expert_slices`). An image or a text is one range of rows, and a pair is two: its image and its text
(`PackedBatch.sequence_ranges`). Sequences are numbered in the order images, pairs, texts.
"""

# I images, P pairs, X texts, B = I + P images with pixels, Q = I + P + X sequences, N patches per image,
# S tokens of all texts, M rows that the head reads, T packed rows, L layers.

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.device_copy import copy_to_device
from beit3_ds.layout import KeptSequences, PickedRows, RowLayout, SequenceLayout
from beit3_ds.patch_grids import Grids


@dataclass(frozen=True, kw_only=True)
class PackedBatch(RowLayout):
    """Holds one micro-batch of images, image-text pairs and texts. Each kind may be absent."""

    num_images: int
    """Number of images without text (I)."""
    num_pairs: int
    """Number of image-text pairs (P)."""
    caption_lengths: tuple[int, ...]
    """Number of tokens of each pair's caption, including BOS and EOS."""
    text_lengths: tuple[int, ...]
    """Number of tokens of each text without image, including BOS and EOS."""
    pixels: Tensor | None
    """Preprocessed images, (images, 3, image_size, image_size): first images without text, then images of pairs. uint8,
    or float32 in [-1, 1]; `pixels.to_floats` converts them for the model. Images of different sizes (`image_grids`) are
    padded at the right and the bottom. None on pipeline stages that do not hold the embeddings."""
    patch_mask: Tensor
    """Whether each patch is replaced by the mask token, (images, patches) bool."""
    token_ids: Tensor
    """Token ids of all captions and then of all texts, (tokens,) int64."""
    image_grids: Grids = ()
    """Numbers of patch rows and patch columns of each image, for a model with `model.dense`; empty for other models.
    Images with grids may have any size and have no CLS row. A batch with grids has no pairs or texts."""
    colors: Tensor | None = None
    """Parameters of three colour changes to apply to each uint8 image (`pixels.change_colors`), (images, 3, 3) float32;
    None for no changes."""
    causal_captions: bool = False
    """Whether attention within image-text pairs is masked for captioning. Image rows then attend only to the image.
    Caption rows attend to the image, to earlier caption rows and to themselves."""
    drop_path: Tensor | None = None
    """Stochastic-depth factor of each sequence, layer and branch, (sequences, layers, 2) float32: 0 if the branch is
    dropped, and 1 / (1 - rate) otherwise. None without stochastic depth, such as in evaluations."""
    head_rows: Tensor | None = None
    """Indices of the rows that the task's head reads, ascending, int64; None if it reads all rows."""
    head_row_counts: tuple[int, ...] = ()
    """Number of `head_rows` in each of the four row ranges (`layout.PARTS`); empty if the head reads all rows."""
    term_counts: tuple[int, ...] = ()
    """Number of predictions in this micro-batch for each loss term, in the order of `Task.terms`."""
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that the task's head needs besides the model's output, by name, such as labels. Empty on pipeline stages
    that do not read samples. Pipeline stages that read the same samples check that their targets are equal. Targets
    with dtype uint8 or a floating-point dtype are not compared."""
    host_targets: Mapping[str, Tensor] = field(default_factory=dict)
    """Further targets: small tensors of integers or bools, such as sizes and counts. `to` leaves them in host memory,
    where the head reads their values without waiting for a device."""
    sample_names: tuple[str, ...] = ()
    """Name of each sequence's sample, for logs and messages; empty if samples have no names."""
    sources: dict[str, int] = field(default_factory=dict)
    """Maps each kind of sample in a validation batch ("images", "pairs" or "texts") to the index of its source in the
    config. All samples of a kind come from this source. Empty in other batches, where the samples of a kind may come
    from several sources."""

    def __post_init__(self) -> None:
        num_pixels = self.num_images + self.num_pairs
        num_tokens = sum(self.caption_lengths) + sum(self.text_lengths)
        assert len(self.caption_lengths) == self.num_pairs, "one caption length per pair"
        assert self.pixels is None or self.pixels.shape[0] == num_pixels, "one view of the model per image"
        assert self.patch_mask.shape[0] == num_pixels, "one mask per image"
        assert self.colors is None or len(self.colors) == num_pixels, "three changes of colours per image"
        assert self.token_ids.shape == (num_tokens,), "text lengths must add up to the tokens"
        assert len(self.image_grids) in (0, num_pixels), "one grid per image"
        assert not self.image_grids or not (num_tokens or self.num_pairs), "images of any size have no texts"
        assert self.head_rows is None or len(self.head_rows) == sum(self.head_row_counts), "every head row is counted"
        assert not self.sample_names or len(self.sample_names) == self.num_sequences, "one name per sequence"

    @property
    def num_texts(self) -> int:
        """Returns the number of texts without image (X)."""
        return len(self.text_lengths)

    @property
    def num_sequences(self) -> int:
        """Returns the number of sequences: images, pairs and texts (Q)."""
        return self.num_images + self.num_pairs + self.num_texts

    @property
    def image_length(self) -> int:
        """Returns the number of rows per image, one for CLS and one per patch. The value is invalid if `image_grids` is
        not empty.
        """
        return 1 + self.patch_mask.shape[1]

    @cached_property
    def layout(self) -> SequenceLayout:
        """Returns the layout of the rows, which gives the rows of each sequence and each expert."""
        return SequenceLayout(
            self.num_images,
            self.caption_lengths,
            self.text_lengths,
            self.image_length,
            self.causal_captions,
            self.image_grids,
        )

    @property
    def part_rows(self) -> tuple[int, ...]:
        """Returns the number of rows in each of the four row ranges (`layout.PARTS`)."""
        return self.layout.part_rows

    @cached_property
    def picked_rows(self) -> PickedRows | None:
        """Returns the rows that the task's head reads, or None if it reads all rows."""
        return None if self.head_rows is None else PickedRows(self.head_rows, self.head_row_counts)

    @property
    def sequence_ranges(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Returns the row ranges [start, stop) of each sequence: one range, or two for a pair (image, caption)."""
        return self.layout.sequence_ranges

    def kept_sequences(self, layer: int, branch: int) -> KeptSequences:
        """Returns the sequences for which stochastic depth keeps a branch.

        Args:
            layer: index of the block, from 0.
            branch: 0 for attention, 1 for the FFN.
        """
        return self.layout.keep(self._keeps[:, layer, branch].tolist())

    @cached_property
    def dropped_rows(self) -> list[list[int]]:
        """Returns two row counts per block: the rows dropped by stochastic depth in attention, and in the FFN."""
        lengths = [sum(stop - start for start, stop in ranges) for ranges in self.sequence_ranges]
        lengths_Q = torch.tensor(lengths, dtype=torch.int64)
        rows: list[list[int]] = torch.where(self._keeps, 0, lengths_Q[:, None, None]).sum(0).tolist()
        return rows

    @cached_property
    def _keeps(self) -> Tensor:
        """Returns whether stochastic depth keeps each branch of each sequence, as a CPU tensor."""
        assert self.drop_path is not None, "nothing is dropped"
        return self.drop_path.cpu() != 0

    @cached_property
    def row_sequence(self) -> Tensor:
        """Returns the index of each row's sequence, (rows,) int64."""
        sequences = torch.arange(self.num_sequences)
        num_pixels = self.num_images + self.num_pairs
        lengths = torch.tensor([*self.caption_lengths, *self.text_lengths], dtype=torch.int64)
        image_rows = sequences[:num_pixels].repeat_interleave(self._image_lengths)
        text_rows = sequences[self.num_images :].repeat_interleave(lengths)
        return copy_to_device(torch.cat([image_rows, text_rows]), self.token_ids.device)

    @property
    def num_patches(self) -> int:
        """Returns the total number of patches of all images, including masked ones."""
        if self.image_grids:
            return self.num_rows
        return self.patch_mask.numel()

    @property
    def _image_lengths(self) -> "Tensor | int":
        if not self.image_grids:
            return self.image_length
        return torch.tensor([height * width for height, width in self.image_grids])

    def row_factors(self, layer: int, branch: int, dtype: torch.dtype) -> Tensor | None:
        """Returns the stochastic-depth factor of each row, (rows,), or None without stochastic depth.

        The first call with a dtype computes the factors of all layers in this dtype.

        Args:
            layer: index of the block, from 0.
            branch: 0 for attention, 1 for the FFN.
            dtype: dtype of the factors.
        """
        if self.drop_path is None:
            return None
        if dtype not in self._row_factors:
            num_rows = self.num_rows
            # Pads the rows of the table, because kernels expect addresses that are multiples of 16 bytes.
            padded = F.pad(self.row_sequence, (0, -num_rows % 8))
            factors_LBT = self.drop_path.permute(1, 2, 0).to(dtype).index_select(2, padded)
            self._row_factors[dtype] = [factor_T[:num_rows] for factor_T in factors_LBT.flatten(0, 1).unbind()]
        return self._row_factors[dtype][2 * layer + branch]

    @cached_property
    def _row_factors(self) -> dict[torch.dtype, list[Tensor]]:
        return {}

    @cached_property
    def text_positions(self) -> Tensor:
        """Returns the position of each token in its caption or text, from 0, (tokens,) int64."""
        lengths = torch.tensor([*self.caption_lengths, *self.text_lengths], dtype=torch.int64)
        starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        return copy_to_device(torch.arange(len(starts)) - starts, self.token_ids.device)

    def with_targets(self, targets: Mapping[str, Tensor]) -> "PackedBatch":
        """Returns a copy with new targets. Keeps the values that `to` has derived from the batch."""
        return self._with_derived_values(dataclasses.replace(self, targets=targets))

    def without_pixels(self) -> "PackedBatch":
        """Returns the batch without pixels and targets, for pipeline stages that hold neither the embeddings nor the
        head.
        """
        return dataclasses.replace(self, pixels=None, targets={}, host_targets={})

    def fingerprint(self) -> str:
        """Returns a digest by which ranks check that they read the same samples.

        Covers the sequences, sample names, token ids, masks, head rows and stochastic-depth factors. Also covers
        targets, except those with dtype uint8 or a floating-point dtype. Does not cover the pixels.
        """
        digest = hashlib.sha256(
            repr(
                (self.num_images, self.caption_lengths, self.text_lengths, self.image_grids, self.causal_captions)
            ).encode()
        )
        digest.update("\n".join(self.sample_names).encode())
        targets = [of[name] for of in (self.targets, self.host_targets) for name in sorted(of)]
        targets = [target for target in targets if not target.is_floating_point() and target.dtype != torch.uint8]
        for tensor in (self.patch_mask, self.token_ids, self.head_rows, self.drop_path, *targets):
            if tensor is not None:
                digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def as_value(self) -> dict[str, Any]:
        """Returns all fields as a dict that `parallel.HostGroup` can send."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_value(cls, value: dict[str, Any]) -> "PackedBatch":
        """Rebuilds a batch from the dict that `as_value` returned."""
        return cls(**value)

    def to(self, device: torch.device) -> "PackedBatch":
        """Returns the batch on `device`, without waiting for the device (`copy_to_device`).

        `host_targets` stay in host memory. Values that later code needs on the host, such as the sequences that
        stochastic depth keeps, are computed here from host memory. A step therefore never reads these values back from
        the device.
        """
        if self.token_ids.device == device:
            return self
        moved: dict[str, Any] = {
            field.name: copy_to_device(value, device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        targets = {name: copy_to_device(value, device) for name, value in self.targets.items()}
        return self._with_derived_values(dataclasses.replace(self, targets=targets, **moved))

    def tensors(self) -> list[Tensor]:
        """Returns all tensors of the batch, and the tensors that the method `to` derives. Leaves out `host_targets`."""
        values = [*vars(self).values(), *self.targets.values()]
        return [value for value in values if isinstance(value, Tensor)]

    def _with_derived_values(self, copy: "PackedBatch") -> "PackedBatch":
        """Copies this batch's derived values to `copy`, a batch with the same sequences, and returns `copy`.

        The values are moved to the device of `copy`.
        """
        device = copy.token_ids.device
        vars(copy).update(layout=self.layout)
        vars(copy).update({name: copy_to_device(getattr(self, name), device) for name in _DERIVED_TENSORS})
        if self.drop_path is not None:
            vars(copy).update(_keeps=self._keeps, dropped_rows=self.dropped_rows)
        return copy


_DERIVED_TENSORS = ("row_sequence", "text_positions")


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """Holds one rank's micro-batches of one optimizer step."""

    step: int
    """Index of the optimizer step, from 0."""
    micro_batches: tuple[PackedBatch, ...]
    """Micro-batches of this rank. All ranks have the same number."""
    broken_records: dict[str, str] = field(default_factory=dict)
    """One-line error message of each broken record in this rank's share, by record name. These records are not in the
    micro-batches."""

    def without_pixels(self) -> "StepBatch":
        """Returns the step with all micro-batches stripped of pixels and targets (`PackedBatch.without_pixels`)."""
        return dataclasses.replace(self, micro_batches=tuple(batch.without_pixels() for batch in self.micro_batches))

    def fingerprint(self) -> str:
        """Returns the step's index and each micro-batch's fingerprint as one text.

        Ranks compare their texts to check that they read the same samples.
        """
        return f"step {self.step}: {[batch.fingerprint() for batch in self.micro_batches]}"

    def as_value(self) -> dict[str, Any]:
        """Returns all fields as a dict that `parallel.HostGroup` can send."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"micro_batches": tuple(batch.as_value() for batch in self.micro_batches)}

    @classmethod
    def from_value(cls, value: dict[str, Any]) -> "StepBatch":
        """Rebuilds a step from the dict that `as_value` returned."""
        batches = tuple(PackedBatch.from_value(batch) for batch in value["micro_batches"])
        return cls(**value | {"micro_batches": batches})
