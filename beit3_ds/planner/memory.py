"""Models the memory of one rank with the formulas of docs/traffic_and_memory.md."""

from collections.abc import Sequence
from typing import NamedTuple

from beit3_ds.kernels.ops.vocabulary_tiles import divide_for_cpu
from beit3_ds.model.dense.relative_positions import covered_extent, wide_head_size
from beit3_ds.pipeline.schedule_1f1b import schedule_1f1b
from beit3_ds.planner.rank_model import RankModel
from beit3_ds.planner.workload import BlockRows, Workload
from beit3_ds.planner.zero3_replay import Zero3Replay, padded, persistent_parameters
from beit3_ds.tasks.build import build_task

_STATISTIC = 4  # bytes of a statistic, which is always float32
_INDEX = 8  # bytes of a row number


class Memory(NamedTuple):
    """Holds the modelled memory of one rank in bytes, at the peak of a step's forward and backward passes."""

    parameters: int
    """Bytes of the parameters; under ZeRO-3, only the rank's partition and the persistent parameters are counted."""
    gradients: int
    """Bytes of the gradient sums that are kept between micro-batches."""
    optimizer: int
    """Bytes of float32 master weights, Adam's two moments, and the weight average (`training.ema_decay`), if any."""
    buckets: int
    """Bytes of the fixed-size buffers in which DeepSpeed reduces gradients."""
    gathered: int
    """Maximum bytes of whole parameters that ZeRO-3 holds gathered at the same time."""
    activations: int
    """Bytes of the tensors that autograd saves for the backward passes of all micro-batches in flight."""
    recomputed: int
    """Bytes of the tensors that exist only while one block is recomputed."""

    @property
    def total(self) -> int:
        """Returns the sum of all parts in bytes."""
        return sum(self)


def rank_memory(rank_model: RankModel, workloads: Sequence[Workload], data_rank: int = 0) -> Memory:
    """Models the memory of one rank at the peak of a step.

    Args:
        rank_model: the rank's part of the model.
        workloads: sizes of the micro-batches of one step.
        data_rank: data-parallel rank. It matters only under ZeRO-2, where ranks keep unequal parts of the gradients.
    """
    return Memory(
        parameters=_parameters(rank_model),
        gradients=_gradients(rank_model, data_rank),
        optimizer=_optimizer(rank_model),
        buckets=_buckets(rank_model),
        gathered=_gathered(rank_model, workloads),
        activations=activation_peak(rank_model, workloads),
        recomputed=_recomputed(rank_model, workloads),
    )


def _parameters(rank_model: RankModel) -> int:
    size, ranks = rank_model.element_size, rank_model.data_parallel_size
    copy = 0 if rank_model.is_first else rank_model.tied_elements if rank_model.is_last else 0
    if rank_model.zero_stage == 0:
        elements = _numel(rank_model)
    elif rank_model.zero_stage < 3:
        elements = sum(ranks * partition for partition in _partitions(rank_model))
    else:
        elements = sum(_partitions(rank_model))
        # The partition of a single rank is the parameter itself.
        elements += sum(padded(p.numel(), ranks) for p in persistent_parameters(rank_model)) if ranks > 1 else 0
    return (elements + copy) * size


def _gradients(rank_model: RankModel, data_rank: int) -> int:
    size = rank_model.gradient_size
    # The copy of a tied table sums its gradient in float32.
    tied = rank_model.tied_elements * 4 if rank_model.is_last and not rank_model.is_first else 0
    if rank_model.zero_stage < 2:
        return _numel(rank_model) * size + tied
    if rank_model.zero_stage == 3:
        return sum(_partitions(rank_model)) * size + tied
    if size > rank_model.element_size:  # ZeRO-2 then sums only this rank's partition
        return sum(_partitions(rank_model)) * size + tied
    elements = 0
    # Besides the gradients of a step's first backward pass, ZeRO-2 keeps zeros for parameters of other model chunks.
    first_pass = {id(p) for p in rank_model.parameters_of(rank_model.chunks[-1])}
    for group, partition in zip(rank_model.groups, _partitions(rank_model), strict=True):
        # A gradient is kept whole if this rank's partition holds any part of it.
        first, end, start = data_rank * partition, (data_rank + 1) * partition, 0
        for parameter in group:
            if start < end and start + parameter.numel() > first:
                elements += parameter.numel() * (1 if id(parameter) in first_pass else 2)
            start += parameter.numel()
    return elements * size + tied


def _optimizer(rank_model: RankModel) -> int:
    average = 0 if rank_model.config.training.ema_decay is None else 4
    if rank_model.zero_stage == 0:
        # In float32 the parameters are the master weights.
        return _numel(rank_model) * (average + (12 if rank_model.config.options.is_bf16 else 8))
    return sum(_partitions(rank_model)) * (average + 12)


def _buckets(rank_model: RankModel) -> int:
    if rank_model.zero_stage == 0 or not rank_model.config.options.zero.get("contiguous_gradients", True):
        return 0
    number = 2 if rank_model.zero_stage < 3 and rank_model.config.options.zero.get("overlap_comm") else 1
    size = rank_model.gradient_size if rank_model.zero_stage == 1 else rank_model.element_size
    return number * rank_model.zero_elements("reduce_bucket_size") * size


def _gathered(rank_model: RankModel, workloads: Sequence[Workload]) -> int:
    if rank_model.zero_stage < 3 or rank_model.data_parallel_size == 1:
        return 0
    replay = Zero3Replay(rank_model)
    for _ in range(2):
        replay.run_step(len(workloads))
    return replay.peak_elements * rank_model.element_size


def _partitions(rank_model: RankModel) -> list[int]:
    """Returns, for each parameter group, the number of elements that one data-parallel rank holds."""
    ranks = rank_model.data_parallel_size
    if rank_model.zero_stage == 3:
        return [sum(-(-p.numel() // ranks) for p in group) for group in rank_model.groups]
    return [padded(sum(p.numel() for p in group), 2 * ranks) // ranks for group in rank_model.groups]


def _numel(rank_model: RankModel) -> int:
    return sum(p.numel() for p in rank_model.model.parameters())


def activation_peak(rank_model: RankModel, workloads: Sequence[Workload]) -> int:
    """Returns the maximum bytes of saved activations at any point of the pipeline schedule of one step."""
    live, peak = 0, 0
    for action in schedule_1f1b(len(workloads), rank_model.stage, rank_model.num_stages, len(rank_model.chunks)):
        kept = chunk_activations(rank_model, rank_model.chunks[action.chunk], workloads[action.micro_batch])
        live += kept if action.forward else -kept
        peak = max(peak, live)
    return peak


def chunk_activations(rank_model: RankModel, chunk: range, workload: Workload) -> int:
    """Returns the bytes that autograd saves in one micro-batch's forward pass through one model chunk."""
    model = rank_model.config.model
    mode = rank_model.config.training.activation_checkpointing
    kept = sum(block_activations(rank_model, chunk, layer, workload, mode) for layer in rank_model.blocks_of(chunk))
    if chunk.start == 0:
        kept += _embedding_activations(rank_model, workload)
    if chunk.stop == model.num_pipeline_layers:
        kept += _head_activations(rank_model, workload)
    return kept


def block_activations(rank_model: RankModel, chunk: range, layer: int, workload: Workload, checkpointing: str) -> int:
    """Returns the bytes that autograd saves for one micro-batch in one block, except parameters and row indices.

    Args:
        rank_model: the rank's part of the model.
        chunk: model chunk that contains the block.
        layer: number of the block in the list of layers, from 1; layer 0 is the embeddings.
        workload: sizes of the micro-batch.
        checkpointing: value of `training.activation_checkpointing`.
    """
    model = rank_model.config.model
    if checkpointing == "full":
        return _own_rows(rank_model, workload.rows) * model.hidden_size * rank_model.stream_size
    rows = rank_model.block_rows(chunk, layer, workload)
    attention = _branch(rank_model, model.attention_experts, model.hidden_size, rows.attention, workload.drops)
    ffn = _branch(rank_model, model.experts(layer - 1), model.ffn_hidden_size, rows.ffn, workload.drops)
    return attention + _attention_core(rank_model, rows, layer - 1) + ffn + _ffn_core(rank_model, rows)


def _branch(rank_model: RankModel, experts: Sequence[str], width: int, rows: int, drops: bool) -> int:
    """Returns the bytes of a part of what one branch (attention or FFN) saves for its backward pass: the tensors for
    the norms and for stochastic depth.
    """
    model, size, ranks = rank_model.config.model, rank_model.element_size, rank_model.tensor.size
    own = _own_rows(rank_model, rows)
    kept = own * (model.hidden_size * rank_model.stream_size + 2 * _STATISTIC + rank_model.stream_size * drops)
    if rank_model.tensor.divides_rows:
        kept += own * ranks * model.hidden_size * size  # the gathered normalized rows
    else:
        kept += 2 * len(experts) * model.hidden_size * size  # scales and shifts, copied to recompute the rows
    if model.sub_layernorm:
        # Scales and shifts, copied for another module, and two statistics per row if ranks divide the rows.
        kept += 2 * len(experts) * width // ranks * size + (2 * rows * _STATISTIC if ranks > 1 else 0)
    return kept


def _attention_core(rank_model: RankModel, rows: BlockRows, layer: int) -> int:
    """Returns the bytes of the tensors that attention saves: queries, keys, values, output, and the scores'
    log-sum-exp.

    With relative positions, all of these except the log-sum-exp are saved in a wider form. The queries and the output
    are saved twice: in the wider form and in their original width.
    """
    model = rank_model.config.model
    width = model.hidden_size // rank_model.tensor.size
    heads = model.num_attention_heads // rank_model.tensor.size
    kept = 4 * width
    if model.dense is not None and model.dense.relative_positions:
        extent = covered_extent(model, layer)
        kept = 2 * width + 4 * heads * wide_head_size(model.head_size, (extent, extent))
    return rows.attention * kept * rank_model.element_size + rows.attended * heads * _STATISTIC


def _ffn_core(rank_model: RankModel, rows: BlockRows) -> int:
    """Returns the bytes of the saved input of GELU. The FFN's other saved tensors are counted in `_branch`."""
    return rows.ffn * rank_model.config.model.ffn_hidden_size // rank_model.tensor.size * rank_model.element_size


def _embedding_activations(rank_model: RankModel, workload: Workload) -> int:
    model = rank_model.config.model
    pixels = workload.images * 3 * model.image_size**2 * rank_model.element_size
    absent = workload.tokens if rank_model.tensor.size > 1 else 0
    return pixels + workload.images * model.num_patches + 2 * workload.tokens * _INDEX + absent


def _head_activations(rank_model: RankModel, workload: Workload) -> int:
    model, size = rank_model.config.model, rank_model.element_size
    own = build_task(rank_model.config).head_memory(workload.images, size)
    if own is not None:
        return own
    # Both heads keep rows before and after the norm, its statistics, targets, row numbers and log-sums.
    rows = model.hidden_size * (rank_model.stream_size + size)
    kept = workload.masked * (rows + 3 * _STATISTIC + 2 * _INDEX)
    kept += _kept_logits(rank_model, workload.masked_patches, model.visual_vocab_size, None)
    return kept + _kept_logits(
        rank_model, workload.masked_tokens, model.text_vocab_size, model.cross_entropy_chunk_size
    )


def _kept_logits(rank_model: RankModel, rows: int, vocabulary: int, chunk_size: int | None) -> int:
    """Returns the bytes of the logit buffers and of the maximum logits.

    There is one maximum logit for each row and vocabulary tile.
    """
    tiles = divide_for_cpu(rows, rank_model.tensor.split_vocabulary(vocabulary).local_size, chunk_size)
    return rows * (tiles.num_buffers * tiles.stride + len(tiles.columns)) * _STATISTIC


def _own_rows(rank_model: RankModel, rows: int) -> int:
    return -(-rows // rank_model.tensor.size) if rank_model.tensor.divides_rows else rows


def _recomputed(rank_model: RankModel, workloads: Sequence[Workload]) -> int:
    if rank_model.config.training.activation_checkpointing == "none":
        return 0
    saved = (
        block_activations(rank_model, chunk, layer, workload, "none")
        - block_activations(rank_model, chunk, layer, workload, "full")
        for chunk in rank_model.chunks
        for layer in rank_model.blocks_of(chunk)
        for workload in workloads
    )
    return max(saved, default=0)
