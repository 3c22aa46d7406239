"""Bytes that one rank keeps: formulas of docs/traffic_and_memory.md."""

# T rows, G rows of a gathered stream, n rows of one rank, P tensor-parallel size, D hidden, F ffn hidden, W = D / P,
# M rows at masked positions, V vocabulary of one rank, padding included, e bytes of an element.

from collections.abc import Sequence
from typing import NamedTuple

from beit3_ds.kernels.ops.vocabulary_blocks import divide_for_cpu
from beit3_ds.pipeline.schedule_1f1b import schedule_1f1b
from beit3_ds.planner.rank_model import RankModel
from beit3_ds.planner.workload import BlockRows, Workload
from beit3_ds.planner.zero3_replay import GatherReplay, padded, persistent_parameters

_STATISTIC = 4  # bytes of what is kept in float32 whatever the stream's type
_INDEX = 8  # bytes of a row number


class Memory(NamedTuple):
    """What a rank keeps at the fullest moment of a step's forward and backward passes, in bytes."""

    parameters: int
    """The model's own: all of this rank's part, or its partition and the persistent ones under ZeRO-3."""
    gradients: int
    """Of earlier micro-batches, while one is under way."""
    optimizer: int
    """Master weights and Adam's two moments, float32."""
    buckets: int
    """DeepSpeed's buffers of a fixed size in which gradients wait to be reduced."""
    gathered: int
    """Whole parameters that ZeRO-3 has gathered at once, at most."""
    activations: int
    """What autograd keeps of all micro-batches that are under way."""
    recomputed: int
    """What recomputation of one block adds."""

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self)


def rank_memory(holding: RankModel, loads: Sequence[Workload], data_rank: int = 0) -> Memory:
    """What one rank keeps.

    Args:
        holding: the rank's part of the model.
        loads: of its micro-batches of a step.
        data_rank: its number among the ranks that hold the same part; under ZeRO-2 they keep unequal parts.
    """
    return Memory(
        parameters=_parameters(holding),
        gradients=_gradients(holding, data_rank),
        optimizer=_optimizer(holding),
        buckets=_buckets(holding),
        gathered=_gathered(holding, loads),
        activations=activation_peak(holding, loads),
        recomputed=_recomputed(holding, loads),
    )


def _parameters(holding: RankModel) -> int:
    size, ranks = holding.element_size, holding.data_size
    copy = 0 if holding.is_first else holding.tied_elements if holding.is_last else 0
    if holding.zero_stage == 0:
        elements = _numel(holding)
    elif holding.zero_stage < 3:
        elements = sum(ranks * partition for partition in _partitions(holding))
    else:
        elements = sum(_partitions(holding))
        # Of a single rank the partition is the parameter.
        elements += sum(padded(p.numel(), ranks) for p in persistent_parameters(holding)) if ranks > 1 else 0
    return (elements + copy) * size


def _gradients(holding: RankModel, data_rank: int) -> int:
    size = holding.gradient_size
    # The copy of a tied table sums its gradient in float32.
    tied = holding.tied_elements * 4 if holding.is_last and not holding.is_first else 0
    if holding.zero_stage < 2:
        return _numel(holding) * size + tied
    if holding.zero_stage == 3:
        return sum(_partitions(holding)) * size + tied
    if size > holding.element_size:  # ZeRO-2 then adds up this rank's partition alone
        return sum(_partitions(holding)) * size + tied
    elements = 0
    # Beside the gradients of a step's first backward pass ZeRO-2 keeps zeros for the other runs' parameters.
    first_pass = {id(p) for p in holding.parameters_of(holding.runs[-1])}
    for group, partition in zip(holding.groups, _partitions(holding), strict=True):
        # A parameter of which this rank's partition holds a part is kept whole.
        first, end, start = data_rank * partition, (data_rank + 1) * partition, 0
        for parameter in group:
            if start < end and start + parameter.numel() > first:
                elements += parameter.numel() * (1 if id(parameter) in first_pass else 2)
            start += parameter.numel()
    return elements * size + tied


def _optimizer(holding: RankModel) -> int:
    if holding.zero_stage == 0:
        return _numel(holding) * (12 if holding.is_bf16 else 8)  # in float32 the parameters are the master weights
    return sum(_partitions(holding)) * 12


def _buckets(holding: RankModel) -> int:
    if holding.zero_stage == 0 or not holding.zero.get("contiguous_gradients", True):
        return 0
    number = 2 if holding.zero_stage < 3 and holding.zero.get("overlap_comm") else 1
    size = holding.gradient_size if holding.zero_stage == 1 else holding.element_size
    return number * int(holding.zero.get("reduce_bucket_size", 500_000_000)) * size


def _gathered(holding: RankModel, loads: Sequence[Workload]) -> int:
    if holding.zero_stage < 3 or holding.data_size == 1:
        return 0
    replay = GatherReplay(holding)
    for _ in range(2):
        replay.run_step(len(loads))
    return replay.peak_elements * holding.element_size


def _partitions(holding: RankModel) -> list[int]:
    """Elements that one data-parallel rank holds of each parameter group."""
    ranks = holding.data_size
    if holding.zero_stage == 3:
        return [sum(-(-p.numel() // ranks) for p in group) for group in holding.groups]
    return [padded(sum(p.numel() for p in group), 2 * ranks) // ranks for group in holding.groups]


def _numel(holding: RankModel) -> int:
    return sum(p.numel() for p in holding.model.parameters())


def activation_peak(holding: RankModel, loads: Sequence[Workload]) -> int:
    """Bytes that autograd keeps at the fullest moment of the schedule, which is after some forward pass."""
    live, peak = 0, 0
    for action in schedule_1f1b(len(loads), holding.stage, holding.num_stages, len(holding.runs)):
        kept = run_activations(holding, holding.runs[action.run], loads[action.micro_batch])
        live += kept if action.forward else -kept
        peak = max(peak, live)
    return peak


def run_activations(holding: RankModel, run: range, load: Workload) -> int:
    """Bytes that autograd keeps of one micro-batch's pass through one run of layers."""
    model = holding.config.model
    mode = holding.config.training.activation_checkpointing
    kept = sum(block_activations(holding, run, layer, load, mode) for layer in holding.blocks_of(run))
    if run.start == 0:
        kept += _embedding_activations(holding, load)
    if run.stop == model.num_pipeline_layers:
        kept += _head_activations(holding, load)
    return kept


def block_activations(holding: RankModel, run: range, layer: int, load: Workload, checkpointing: str) -> int:
    """Bytes that autograd keeps of one micro-batch in one block; parameters and row numbers are not among them.

    Args:
        holding: the rank's part of the model.
        run: of layers, among which the block is.
        layer: the block's number in the list of layers.
        load: of the micro-batch.
        checkpointing: `training.activation_checkpointing`.
    """
    model = holding.config.model
    if checkpointing == "full":
        return _own_rows(holding, load.rows) * model.hidden_size * holding.stream_size
    rows = holding.block_rows(run, layer, load)
    attention = _branch(holding, model.attention_experts, model.hidden_size, rows.attention, load.drops)
    ffn = _branch(holding, model.experts(layer - 1), model.ffn_hidden_size, rows.ffn, load.drops)
    return attention + _attention_core(holding, rows) + ffn + _ffn_core(holding, rows)


def _branch(holding: RankModel, experts: Sequence[str], width: int, rows: int, drops: bool) -> int:
    """What attention and FFN keep alike: the stream and statistics of its norm, factors, and a sub-LN's parameters."""
    model, size, ranks = holding.config.model, holding.element_size, holding.tensor.size
    own = _own_rows(holding, rows)
    kept = own * (model.hidden_size * holding.stream_size + 2 * _STATISTIC + holding.stream_size * drops)
    if holding.tensor.divides_rows:
        kept += own * ranks * model.hidden_size * size  # the normalised rows, which were gathered
    else:
        kept += 2 * len(experts) * model.hidden_size * size  # scales and shifts, copied to make the rows again
    if model.sub_layernorm:
        # Scales and shifts, copied for another module, and two statistics a row where ranks divide it.
        kept += 2 * len(experts) * width // ranks * size + (2 * rows * _STATISTIC if ranks > 1 else 0)
    return kept


def _attention_core(holding: RankModel, rows: BlockRows) -> int:
    """Queries, keys, values, what the attention op makes of them for the output projection, and log-sums."""
    model = holding.config.model
    width = model.hidden_size // holding.tensor.size
    heads = model.num_attention_heads // holding.tensor.size
    return 4 * rows.attention * width * holding.element_size + rows.attended * heads * _STATISTIC


def _ffn_core(holding: RankModel, rows: BlockRows) -> int:
    """The GELU's input; the rest is made again."""
    return rows.ffn * holding.config.model.ffn_hidden_size // holding.tensor.size * holding.element_size


def _embedding_activations(holding: RankModel, load: Workload) -> int:
    model = holding.config.model
    pixels = load.images * 3 * model.image_size**2 * holding.element_size
    absent = load.tokens if holding.tensor.size > 1 else 0
    return pixels + load.images * model.num_patches + 2 * load.tokens * _INDEX + absent


def _head_activations(holding: RankModel, load: Workload) -> int:
    model, size = holding.config.model, holding.element_size
    # Both heads: rows before the norm and after it, its statistics, targets and row numbers, log-sums.
    rows = model.hidden_size * (holding.stream_size + size)
    kept = load.masked * (rows + 3 * _STATISTIC + 2 * _INDEX)
    kept += _kept_logits(holding, load.masked_patches, model.visual_vocab_size, None)
    return kept + _kept_logits(holding, load.masked_tokens, model.text_vocab_size, model.cross_entropy_chunk_size)


def _kept_logits(holding: RankModel, rows: int, vocabulary: int, chunk_size: int | None) -> int:
    """Buffers of logits, and the largest of every row as each block of the vocabulary found it."""
    blocks = divide_for_cpu(rows, holding.tensor.split_vocabulary(vocabulary).local_size, chunk_size)
    return rows * (blocks.num_buffers * blocks.stride + len(blocks.columns)) * _STATISTIC


def _own_rows(holding: RankModel, rows: int) -> int:
    return -(-rows // holding.tensor.size) if holding.tensor.divides_rows else rows


def _recomputed(holding: RankModel, loads: Sequence[Workload]) -> int:
    if holding.config.training.activation_checkpointing == "none":
        return 0
    saved = (
        block_activations(holding, run, layer, load, "none") - block_activations(holding, run, layer, load, "full")
        for run in holding.runs
        for layer in holding.blocks_of(run)
        for load in loads
    )
    return max(saved, default=0)
