"""Models how many communication calls one rank makes per step, and their bytes (docs/traffic_and_memory.md)."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import nn

from beit3_ds.planner.rank_model import RankModel
from beit3_ds.planner.workload import Workload
from beit3_ds.planner.zero3_replay import Zero3Replay, padded

_ALLREDUCE_BUCKET = 500_000_000  # elements that the engine reduces at once without ZeRO


class Volume(NamedTuple):
    """Counts one rank's calls of a communication operation along a mesh axis, and the bytes of these calls."""

    calls: int
    """Number of calls."""
    num_bytes: int
    """Total bytes of the calls' tensors: outputs for an all-gather, inputs for a reduce-scatter."""


class Traffic:
    """Counts one rank's communication calls and their bytes, by mesh axis and operation.

    Axes are "data", "tensor", "pipeline", "model" (the ranks of one copy of the model) and "world". Operations are
    "all-reduce", "all-gather", "reduce-scatter", "send" and "receive". Calls in a group of one rank are not counted.
    """

    def __init__(self, rank_model: RankModel) -> None:
        """Starts with zero traffic.

        Args:
            rank_model: the rank's part of the model, and the sizes of the mesh.
        """
        data, model = rank_model.data_parallel_size, rank_model.model_parallel_size
        self.sizes = {"data": data, "tensor": rank_model.tensor.size, "model": model, "world": data * model}
        self.sizes["pipeline"] = rank_model.num_stages
        self.volumes: dict[tuple[str, str], Volume] = {}

    def add(self, axis: str, kind: str, num_bytes: int, calls: int = 1) -> None:
        """Adds calls of one operation along one axis.

        Args:
            axis: axis of the mesh.
            kind: operation, such as "all-reduce".
            num_bytes: total bytes of the calls' tensors.
            calls: number of calls.
        """
        if self.sizes[axis] > 1 and calls:
            old = self.volumes.get((axis, kind), Volume(0, 0))
            self.volumes[axis, kind] = Volume(old.calls + calls, old.num_bytes + num_bytes)

    def sent_bytes(self, axis: str, kind: str | None = None) -> float:
        """Returns the bytes that this rank sends along one axis, assuming ring algorithms.

        Among P ranks, an all-gather or a reduce-scatter sends (P - 1) / P of the tensor, and an all-reduce twice as
        much.

        Args:
            axis: axis of the mesh.
            kind: operation, such as "all-reduce"; None counts all operations.
        """
        ring = (self.sizes[axis] - 1) / self.sizes[axis]
        factors = {"all-reduce": 2 * ring, "all-gather": ring, "reduce-scatter": ring, "send": 1.0, "receive": 0.0}
        return sum(
            factors[own_kind] * volume.num_bytes
            for (own_axis, own_kind), volume in self.volumes.items()
            if own_axis == axis and kind in (None, own_kind)
        )


def step_traffic(rank_model: RankModel, workloads: Sequence[Workload], step: int = 1) -> Traffic:
    """Models the communication of one rank in one step, including gradients and update.

    Args:
        rank_model: the rank's part of the model.
        workloads: sizes of the rank's micro-batches.
        step: index of the step, from 0. ZeRO-3 records the order of the modules during the first steps, and then
            prefetches.
    """
    traffic = Traffic(rank_model)
    for workload in workloads:
        for chunk in rank_model.chunks:
            _add_tensor_traffic(traffic, rank_model, chunk, workload)
            _add_messages(traffic, rank_model, chunk, workload)
    _add_tied_table(traffic, rank_model)
    _add_gradients(traffic, rank_model, len(workloads))
    _add_update(traffic, rank_model)
    if rank_model.zero_stage == 3 and rank_model.data_parallel_size > 1:
        replay = Zero3Replay(rank_model)
        for _ in range(step + 1):
            calls, elements = replay.run_step(len(workloads))
        traffic.add("data", "all-gather", elements * rank_model.element_size, calls)
    return traffic


def _add_tensor_traffic(traffic: Traffic, rank_model: RankModel, chunk: range, workload: Workload) -> None:
    if rank_model.tensor.size == 1:
        return
    model = rank_model.config.model
    if chunk.start == 0:
        _add_embeddings(traffic, rank_model, workload)
    for layer in rank_model.blocks_of(chunk):
        _add_block(traffic, rank_model, chunk, layer, workload)
    if chunk.stop == model.num_pipeline_layers:
        _add_heads(traffic, rank_model, chunk, workload)


def _branch_bytes(rank_model: RankModel, rows: int) -> int:
    """Returns the bytes of `rows` input rows of attention or FFN, including the padding of sequence parallelism."""
    rows = padded(rows, rank_model.tensor.size) if rank_model.tensor.divides_rows else rows
    return rows * rank_model.config.model.hidden_size * rank_model.element_size


def _stream_bytes(rank_model: RankModel, rows: int) -> int:
    """Returns the bytes of `rows` rows of the residual stream, including the padding of sequence parallelism."""
    return _branch_bytes(rank_model, rows) // rank_model.element_size * rank_model.stream_size


def _add_embeddings(traffic: Traffic, rank_model: RankModel, workload: Workload) -> None:
    words = workload.tokens * rank_model.config.model.hidden_size * rank_model.element_size
    traffic.add("tensor", "all-reduce", words, int(words > 0))
    if rank_model.tensor.divides_rows:
        traffic.add("tensor", "all-gather", _branch_bytes(rank_model, workload.rows))


def _add_block(traffic: Traffic, rank_model: RankModel, chunk: range, layer: int, workload: Workload) -> None:
    config, model = rank_model.config, rank_model.config.model
    # Attention and FFN each copy their input to the tensor-parallel ranks and reduce their output: in the forward pass,
    # in the backward pass, and in recomputation, which without factors of stochastic depth stops before the last sum.
    passes = 2 if config.training.activation_checkpointing == "full" else 1
    rows = rank_model.block_rows(chunk, layer, workload)
    _residual_add(traffic, rank_model, model.attention_experts, rows.attention, passes, passes)
    _residual_add(traffic, rank_model, model.experts(layer - 1), rows.ffn, passes, passes if workload.drops else 1)
    if rank_model.cuts_rows(chunk, layer) and rank_model.tensor.divides_rows:  # gathers the rows and divides them again
        traffic.add("tensor", "all-gather", passes * _stream_bytes(rank_model, workload.rows), passes)
        traffic.add("tensor", "all-gather", _stream_bytes(rank_model, workload.masked), int(workload.masked > 0))


def _residual_add(
    traffic: Traffic, rank_model: RankModel, experts: Sequence[str], rows: int, enters: int, leaves: int
) -> None:
    """Adds the tensor-parallel traffic of one residual branch of a block, forward and backward.

    The branch is attention or FFN, with its norms and with the addition of its output to the residual stream.

    Args:
        traffic: counts to add to.
        rank_model: the rank's part of the model.
        experts: names of the experts of the branch.
        rows: number of rows that the branch computes.
        enters: number of times that forward computation copies the branch's input to the tensor-parallel ranks,
            including recomputation.
        leaves: number of times that forward computation sums the branch's output over the tensor-parallel ranks,
            including recomputation.
    """
    model, stream = rank_model.config.model, _branch_bytes(rank_model, rows)
    if rank_model.tensor.divides_rows:
        if rows:
            traffic.add("tensor", "all-gather", (enters + 1) * stream, enters + 1)
            traffic.add("tensor", "reduce-scatter", (leaves + 1) * stream, leaves + 1)
        width = len(experts) * model.hidden_size * rank_model.element_size
        traffic.add("tensor", "all-reduce", 2 * width + width, 2)  # the norm's weights and biases; output biases
    elif rows:
        traffic.add("tensor", "all-reduce", (leaves + 1) * stream, leaves + 1)
    if model.sub_layernorm and rows:
        floats = 2 * rows * 4
        traffic.add("tensor", "all-gather", enters * rank_model.tensor.size * floats, enters)
        traffic.add("tensor", "all-reduce", floats)


def _add_heads(traffic: Traffic, rank_model: RankModel, chunk: range, workload: Workload) -> None:
    rows = workload.masked if rank_model.config.model.num_layers in chunk else workload.rows
    if rank_model.tensor.divides_rows and rows:
        traffic.add("tensor", "all-gather", _stream_bytes(rank_model, rows))
    for rows in (workload.masked_patches, workload.masked_tokens):
        if rows:
            gradient = rows * rank_model.config.model.hidden_size * rank_model.element_size
            traffic.add("tensor", "all-reduce", gradient + 3 * rows * 4, 3)


def _add_messages(traffic: Traffic, rank_model: RankModel, chunk: range, workload: Workload) -> None:
    own = _stream_bytes(rank_model, workload.rows) // (rank_model.tensor.size if rank_model.tensor.divides_rows else 1)
    receives, sends = int(chunk.start > 0), int(chunk.stop < rank_model.config.model.num_pipeline_layers)
    # Each received activation sends a gradient back, and each sent activation receives one.
    traffic.add("pipeline", "receive", (receives + sends) * own, receives + sends)
    traffic.add("pipeline", "send", (receives + sends) * own, receives + sends)


def _add_tied_table(traffic: Traffic, rank_model: RankModel) -> None:
    elements = rank_model.tied_elements
    table, gradient = elements * rank_model.element_size, elements * 4
    if elements and rank_model.is_first:
        traffic.add("pipeline", "send", table)
        traffic.add("pipeline", "receive", gradient)
    elif elements and rank_model.is_last:
        traffic.add("pipeline", "receive", table)
        traffic.add("pipeline", "send", gradient)


def _add_gradients(traffic: Traffic, rank_model: RankModel, num_micro_batches: int) -> None:
    size = rank_model.reduced_size
    bucket = rank_model.zero_elements("reduce_bucket_size")
    everything = list(rank_model.model.parameters())
    if rank_model.zero_stage == 0:
        _reduce(traffic, "all-reduce", everything, size, lambda numel, more: numel > _ALLREDUCE_BUCKET)
    elif rank_model.zero_stage == 1:
        ordered = [p for group in rank_model.groups for p in group]
        _reduce(traffic, "all-reduce", ordered, size, lambda numel, more: numel + more > bucket)
    for chunk in rank_model.chunks if rank_model.zero_stage >= 2 else ():
        arriving = list(reversed(rank_model.parameters_of(chunk)))
        kind = "all-reduce" if rank_model.zero_stage == 2 else "reduce-scatter"
        for _ in range(num_micro_batches):
            _reduce(traffic, kind, arriving, size, lambda numel, more: numel + more > bucket)


def _reduce(
    traffic: Traffic,
    kind: str,
    parameters: Iterable[nn.Parameter],
    element_size: int,
    is_full: Callable[[int, int], bool],
) -> None:
    """Adds the reductions of gradient buckets to the counted traffic.

    Args:
        traffic: counts to add to.
        kind: operation, "all-reduce" or "reduce-scatter".
        parameters: parameters in the order in which their gradients fill buckets.
        element_size: bytes per element of a sent gradient.
        is_full: function that decides whether the bucket is reduced before the next gradient is added to it. The
            arguments are the number of elements in the bucket and the number of elements of the next gradient.
    """
    ranks = traffic.sizes["data"] if kind == "reduce-scatter" else 1
    calls, held, elements = 0, 0, 0
    for parameter in parameters:
        numel = parameter.numel()
        elements += padded(numel, ranks)
        if held and is_full(held, numel):
            calls, held = calls + 1, 0
        held += numel
    traffic.add("data", kind, elements * element_size, calls + int(held > 0))


def _add_update(traffic: Traffic, rank_model: RankModel) -> None:
    """Adds the traffic of the gradient norm and, under ZeRO-1 and ZeRO-2, of gathering the updated parameters."""
    stage, groups = rank_model.zero_stage, len(rank_model.groups)
    if stage == 3:
        traffic.add("world", "all-reduce", 4)
    elif stage == 0 and not rank_model.config.options.is_bf16:
        traffic.add("model", "all-reduce", 4)
    else:
        for axis in ("data", "model") if stage else ("model",):
            traffic.add(axis, "all-reduce", groups * 4, groups)
    if stage in (1, 2):
        for group in rank_model.groups:
            elements = padded(sum(p.numel() for p in group), 2 * rank_model.data_parallel_size)
            traffic.add("data", "all-gather", elements * rank_model.element_size)
