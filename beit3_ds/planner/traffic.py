"""Collective calls and bytes of one rank in one optimizer step: formulas of docs/traffic_and_memory.md."""

# T rows of a micro-batch, n = ceil(T / P) rows of one rank, P tensor-parallel size, D hidden, S text tokens, M rows at
# masked positions, e bytes of an element.

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import nn

from beit3_ds.planner.rank_model import RankModel
from beit3_ds.planner.workload import Workload
from beit3_ds.planner.zero3_replay import GatherReplay, padded

_ALLREDUCE_BUCKET = 500_000_000  # elements; what the engine reduces at once without ZeRO


class Volume(NamedTuple):
    """What one rank sends or receives through calls of one kind."""

    calls: int
    num_bytes: int
    """Of the whole tensors: what is reduced, what comes out of an all-gather, what goes into a reduce-scatter."""


class Traffic:
    """Volumes by axis (`data`, `tensor`, `pipeline`, `model`, `world`) and kind of call.

    `model` are the ranks of one copy of the model. Calls over a single rank move nothing and are left out.
    """

    def __init__(self, holding: RankModel) -> None:
        """Starts with nothing sent; the sizes of the axes are those of the holding's mesh."""
        data, model = holding.data_size, holding.model_size
        self.sizes = {"data": data, "tensor": holding.tensor.size, "model": model, "world": data * model}
        self.sizes["pipeline"] = holding.num_stages
        self.volumes: dict[tuple[str, str], Volume] = {}

    def add(self, axis: str, kind: str, num_bytes: int, calls: int = 1) -> None:
        """Adds `calls` calls that together move `num_bytes`."""
        if self.sizes[axis] > 1 and calls:
            old = self.volumes.get((axis, kind), Volume(0, 0))
            self.volumes[axis, kind] = Volume(old.calls + calls, old.num_bytes + num_bytes)

    def sent_bytes(self, axis: str, kind: str | None = None) -> float:
        """Bytes that leave this rank along one axis, in calls of one kind or of all, if rings do the collectives.

        Of P ranks, (P - 1) / P of the whole tensor in an all-gather or a reduce-scatter, twice that in an all-reduce;
        all of it in a send.
        """
        ring = (self.sizes[axis] - 1) / self.sizes[axis]
        factors = {"all-reduce": 2 * ring, "all-gather": ring, "reduce-scatter": ring, "send": 1.0, "receive": 0.0}
        return sum(
            factors[own_kind] * volume.num_bytes
            for (own_axis, own_kind), volume in self.volumes.items()
            if own_axis == axis and kind in (None, own_kind)
        )


def step_traffic(holding: RankModel, loads: Sequence[Workload], step: int = 1) -> Traffic:
    """What one rank sends in one optimizer step: `Schedule.accumulate_gradients` and `apply_update`.

    Args:
        holding: the rank's part of the model.
        loads: of its micro-batches.
        step: number from 0 since the engine was built. ZeRO-3 learns the order of modules in the first ones.
    """
    traffic = Traffic(holding)
    for load in loads:
        for run in holding.runs:
            _add_tensor_traffic(traffic, holding, run, load)
            _add_messages(traffic, holding, run, load)
    _add_tied_table(traffic, holding)
    _add_gradients(traffic, holding, len(loads))
    _add_update(traffic, holding)
    if holding.zero_stage == 3 and holding.data_size > 1:
        replay = GatherReplay(holding)
        for _ in range(step + 1):
            calls, elements = replay.run_step(len(loads))
        traffic.add("data", "all-gather", elements * holding.element_size, calls)
    return traffic


def _add_tensor_traffic(traffic: Traffic, holding: RankModel, run: range, load: Workload) -> None:
    if holding.tensor.size == 1:
        return
    model = holding.config.model
    if run.start == 0:
        _add_embeddings(traffic, holding, load)
    for layer in holding.blocks_of(run):
        _add_block(traffic, holding, run, layer, load)
    if run.stop == model.num_pipeline_layers:
        _add_heads(traffic, holding, run, load)


def _branch_bytes(holding: RankModel, rows: int) -> int:
    """Returns the bytes T D e of a branch's input or output; sequence parallelism rounds T up to a multiple of P."""
    rows = padded(rows, holding.tensor.size) if holding.tensor.divides_rows else rows
    return rows * holding.config.model.hidden_size * holding.element_size


def _stream_bytes(holding: RankModel, rows: int) -> int:
    """Returns the bytes T D s of the residual stream, whose elements may be wider than a branch's."""
    return _branch_bytes(holding, rows) // holding.element_size * holding.stream_size


def _add_embeddings(traffic: Traffic, holding: RankModel, load: Workload) -> None:
    words = load.tokens * holding.config.model.hidden_size * holding.element_size
    traffic.add("tensor", "all-reduce", words, int(words > 0))
    if holding.tensor.divides_rows:
        traffic.add("tensor", "all-gather", _branch_bytes(holding, load.rows))


def _add_block(traffic: Traffic, holding: RankModel, run: range, layer: int, load: Workload) -> None:
    config, model = holding.config, holding.config.model
    # Attention and FFN hand the stream in and sum it out, forward, backward, and forward again if recomputed; without
    # factors of stochastic depth recomputation stops before the last sum.
    passes = 2 if config.training.activation_checkpointing == "full" else 1
    rows = holding.block_rows(run, layer, load)
    _residual_add(traffic, holding, model.attention_experts, rows.attention, passes, passes)
    _residual_add(traffic, holding, model.experts(layer - 1), rows.ffn, passes, passes if load.drops else 1)
    if holding.cuts_rows(run, layer) and holding.tensor.divides_rows:  # the rows are gathered and divided anew
        traffic.add("tensor", "all-gather", passes * _stream_bytes(holding, load.rows), passes)
        traffic.add("tensor", "all-gather", _stream_bytes(holding, load.masked), int(load.masked > 0))


def _residual_add(
    traffic: Traffic, holding: RankModel, experts: Sequence[str], rows: int, enters: int, leaves: int
) -> None:
    """One attention or FFN over `rows` rows, which enter and leave it so often; the backward pass adds one of each."""
    model, stream = holding.config.model, _branch_bytes(holding, rows)
    if holding.tensor.divides_rows:
        if rows:
            traffic.add("tensor", "all-gather", (enters + 1) * stream, enters + 1)
            traffic.add("tensor", "reduce-scatter", (leaves + 1) * stream, leaves + 1)
        width = len(experts) * model.hidden_size * holding.element_size
        traffic.add("tensor", "all-reduce", 2 * width + width, 2)  # the norm's weights and biases; output biases
    elif rows:
        traffic.add("tensor", "all-reduce", (leaves + 1) * stream, leaves + 1)
    if model.sub_layernorm and rows:
        floats = 2 * rows * 4
        traffic.add("tensor", "all-gather", enters * holding.tensor.size * floats, enters)
        traffic.add("tensor", "all-reduce", floats)


def _add_heads(traffic: Traffic, holding: RankModel, run: range, load: Workload) -> None:
    rows = load.masked if holding.config.model.num_layers in run else load.rows
    if holding.tensor.divides_rows and rows:
        traffic.add("tensor", "all-gather", _stream_bytes(holding, rows))
    for rows in (load.masked_patches, load.masked_tokens):
        if rows:
            gradient = rows * holding.config.model.hidden_size * holding.element_size
            traffic.add("tensor", "all-reduce", gradient + 3 * rows * 4, 3)


def _add_messages(traffic: Traffic, holding: RankModel, run: range, load: Workload) -> None:
    own = _stream_bytes(holding, load.rows) // (holding.tensor.size if holding.tensor.divides_rows else 1)
    receives, sends = int(run.start > 0), int(run.stop < holding.config.model.num_pipeline_layers)
    # An activation comes in and its gradient goes back; an activation goes out and its gradient comes back.
    traffic.add("pipeline", "receive", (receives + sends) * own, receives + sends)
    traffic.add("pipeline", "send", (receives + sends) * own, receives + sends)


def _add_tied_table(traffic: Traffic, holding: RankModel) -> None:
    elements = holding.tied_elements
    table, gradient = elements * holding.element_size, elements * 4
    if elements and holding.is_first:
        traffic.add("pipeline", "send", table)
        traffic.add("pipeline", "receive", gradient)
    elif elements and holding.is_last:
        traffic.add("pipeline", "receive", table)
        traffic.add("pipeline", "send", gradient)


def _add_gradients(traffic: Traffic, holding: RankModel, num_micro_batches: int) -> None:
    size = holding.reduced_size
    bucket = int(holding.zero.get("reduce_bucket_size", 500_000_000))
    everything = list(holding.model.parameters())
    if holding.zero_stage == 0:
        _reduce(traffic, "all-reduce", everything, size, lambda numel, more: numel > _ALLREDUCE_BUCKET)
    elif holding.zero_stage == 1:
        ordered = [p for group in holding.groups for p in group]
        _reduce(traffic, "all-reduce", ordered, size, lambda numel, more: numel + more > bucket)
    for run in holding.runs if holding.zero_stage >= 2 else ():
        arriving = list(reversed(holding.parameters_of(run)))
        kind = "all-reduce" if holding.zero_stage == 2 else "reduce-scatter"
        for _ in range(num_micro_batches):
            _reduce(traffic, kind, arriving, size, lambda numel, more: numel + more > bucket)


def _reduce(
    traffic: Traffic,
    kind: str,
    parameters: Iterable[nn.Parameter],
    element_size: int,
    is_full: Callable[[int, int], bool],
) -> None:
    """Fills buckets in order; `is_full` is told what a bucket holds and what would come next."""
    ranks = traffic.sizes["data"] if kind == "reduce-scatter" else 1
    calls, held, elements = 0, 0, 0
    for parameter in parameters:
        numel = parameter.numel()
        elements += padded(numel, ranks)
        if held and is_full(held, numel):
            calls, held = calls + 1, 0
        held += numel
    traffic.add("data", kind, elements * element_size, calls + int(held > 0))


def _add_update(traffic: Traffic, holding: RankModel) -> None:
    """The gradient norm, and the new weights under ZeRO-1 and 2."""
    stage, groups = holding.zero_stage, len(holding.groups)
    if stage == 3:
        traffic.add("world", "all-reduce", 4)
    elif stage == 0 and not holding.is_bf16:
        traffic.add("model", "all-reduce", 4)
    else:
        for axis in ("data", "model") if stage else ("model",):
            traffic.add(axis, "all-reduce", groups * 4, groups)
    if stage in (1, 2):
        for group in holding.groups:
            elements = padded(sum(p.numel() for p in group), 2 * holding.data_size)
            traffic.add("data", "all-gather", elements * holding.element_size)
