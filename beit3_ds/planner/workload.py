"""Computes the sizes of a micro-batch that determine its traffic and memory."""

from typing import NamedTuple

import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.config import RunConfig, SampleCounts
from beit3_ds.kernels.ops.attention_plan import plan_attention
from beit3_ds.layout import SequenceLayout
from beit3_ds.model.block import computed_sequences
from beit3_ds.tasks.build import build_task
from beit3_ds.tasks.pretraining.config import pretraining_config
from beit3_ds.tasks.pretraining.targets import with_masks


class BlockRows(NamedTuple):
    """Holds the numbers of rows that one block computes for a micro-batch, in attention and in the FFN."""

    attention: int
    """Number of rows in attention."""
    attended: int
    """Number of rows that PyTorch's attention processes (`kernels.ops.attention_plan`), including padding."""
    ffn: int
    """Number of rows in the FFN."""


class Workload(NamedTuple):
    """Holds the sizes of a micro-batch that determine its traffic and memory."""

    rows: int
    """Number of packed rows (T)."""
    tokens: int
    """Number of tokens of all captions and texts (S)."""
    images: int
    """Number of images (B), including images of pairs."""
    masked_patches: int
    """Number of masked patches. Each masked patch is one input row of the MIM head."""
    masked_tokens: int
    """Number of masked text tokens. Each masked token is one input row of the MLM head."""
    drops: bool
    """Whether the model uses stochastic depth."""
    every_row: BlockRows
    """Numbers of rows in a block that skips no rows."""
    kept_rows: tuple[BlockRows, ...] = ()
    """Numbers of rows that attention and FFN compute in each block, without the sequences that stochastic depth drops;
    empty without stochastic depth."""

    @property
    def masked(self) -> int:
        """Returns the number of masked rows (M)."""
        return self.masked_patches + self.masked_tokens


def workload_of(batch: PackedBatch) -> Workload:
    """Returns the `Workload` of a packed micro-batch."""
    image_mim, text_mlm, pair_mim, pair_mlm = batch.term_counts
    num_layers = 0 if batch.drop_path is None else batch.drop_path.shape[1]
    return Workload(
        rows=batch.num_rows,
        tokens=len(batch.token_ids),
        images=len(batch.patch_mask),
        masked_patches=image_mim + pair_mim,
        masked_tokens=text_mlm + pair_mlm,
        drops=batch.drop_path is not None,
        every_row=BlockRows(batch.num_rows, _attended(batch, batch.layout), batch.num_rows),
        kept_rows=tuple(_kept_rows(batch, layer) for layer in range(num_layers)),
    )


def _kept_rows(batch: PackedBatch, layer: int) -> BlockRows:
    branches = (computed_sequences(batch, layer, branch) for branch in range(2))
    attention, ffn = (batch.layout if kept is None else kept.layout for kept in branches)
    return BlockRows(attention.num_rows, _attended(batch, attention), ffn.num_rows)


def _attended(batch: PackedBatch, layout: SequenceLayout) -> int:
    plan = plan_attention(layout.sequence_ranges, batch.token_ids.device, layout.causal_captions)
    return sum(len(bucket.rows) for bucket in plan.buckets)


def expected_workloads(config: RunConfig, data_parallel_size: int) -> list[Workload]:
    """Returns the workloads of one step's micro-batches on the data-parallel rank with the most samples.

    Assumes that all texts have full length and that stochastic depth drops nothing.

    Raises:
        ConfigError: if a step has fewer samples than there are data-parallel ranks.
    """
    shares = config.step_shares(data_parallel_size)
    sizes = shares.divide_rank(shares.rank_samples(0))
    workloads = {size: _expected_workload(config, size) for size in set(sizes)}
    return [workloads[size] for size in sizes]


def _expected_workload(config: RunConfig, size: SampleCounts) -> Workload:
    model, data = config.model, config.data
    images, pairs, texts = size
    pairs *= build_task(config).pairs_per_sample
    tokens = pairs * data.pair_text_length + texts * data.text_length
    ratios = pretraining_config(config)
    masked_tokens = pairs * data.pair_text_length * ratios.pair_text_mask_ratio
    masked_tokens += texts * data.text_length * ratios.text_mask_ratio
    num_patches = 0 if model.dense is not None else model.num_patches
    patch_mask = torch.zeros(images + pairs, num_patches, dtype=torch.bool)
    patch_mask[:, : round(num_patches * ratios.image_mask_ratio)] = True
    inputs = PackedBatch(
        num_images=images,
        num_pairs=pairs,
        caption_lengths=(data.pair_text_length,) * pairs,
        text_lengths=(data.text_length,) * texts,
        pixels=None,
        image_grids=((model.grid_size, model.grid_size),) * (images if model.dense is not None else 0),
        patch_mask=patch_mask,
        token_ids=torch.zeros(tokens, dtype=torch.int64),
    )
    positions = torch.arange(round(masked_tokens))
    batch = with_masks(inputs, masked_tokens=positions, target_ids=torch.zeros_like(positions))
    return workload_of(batch)._replace(drops=model.drop_path_rate > 0)
