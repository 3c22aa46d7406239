"""Models what a node needs besides its GPUs: memory, shared memory and file reads.

docs/traffic_and_memory.md explains the figures.
"""

from dataclasses import dataclass
from typing import NamedTuple

from beit3_ds.config import ConfigError, RunConfig
from beit3_ds.config.prefetch import ImageViews, image_bytes, plan_prefetch, step_bytes
from beit3_ds.planner.memory import Memory, rank_memory
from beit3_ds.planner.model_state import ModelState, model_state
from beit3_ds.planner.rank_model import build_rank_model
from beit3_ds.planner.workload import expected_workloads
from beit3_ds.tasks import Task, build_task

_GIB = 1 << 30
_RANK_BYTES = int(0.6 * _GIB)  # 0.54 measured on a CPU after all imports; does not include a CUDA context
_WORKER_BYTES = int(0.05 * _GIB)  # 0.02 measured after all imports, without pages shared with its parent; decoding
_IMAGE_FILE_BYTES = 100_000  # assumed: a JPEG of about 500 x 400 pixels


class HostRequirements(NamedTuple):
    """Holds the modelled requirements of the node that needs the most memory."""

    shm: int
    """Bytes of /dev/shm for the prefetched steps of the node's ranks."""
    ranks: int
    """Bytes of memory for the node's rank processes and their libraries. Host memory that CUDA takes is not included.
    """
    workers: int
    """Memory of the data workers, in bytes. Each worker holds libraries, one packed step, and the samples of the
    micro-batch that it packs."""
    validation: int
    """Memory of the validation batches that the ranks keep, in bytes."""
    checkpoint: int
    """Bytes of the copied training state, which is written to checkpoints while training continues."""
    offloaded: int
    """Bytes of master weights, moments, gradients and parameters that DeepSpeed offloads to the host."""
    pinned: int
    """Bytes of `offloaded` that DeepSpeed pins (page-locked memory)."""
    num_workers: int
    """Number of data workers on the node."""
    images_per_step: int
    """Number of images that the node's ranks decode per step."""
    records_per_step: int
    """Number of records that the node's ranks read per step."""

    @property
    def memory(self) -> int:
        """Returns the bytes of memory that the run needs on the node, including /dev/shm."""
        return self.shm + self.ranks + self.workers + self.validation + self.checkpoint + self.offloaded


@dataclass(frozen=True, kw_only=True)
class NodeSize:
    """Holds the sizes of a node's memory and of its /dev/shm. An unknown size is None."""

    memory: int | None = None
    """Bytes of memory that the run's processes may use."""
    shm: int | None = None
    """Bytes of /dev/shm."""
    name: str = "a node"
    """Name of the node, for messages."""


def host_requirements(config: RunConfig, world_size: int, ranks_per_node: int) -> HostRequirements:
    """Models the requirements of the node that needs the most memory.

    Args:
        config: the run's configuration.
        world_size: total number of ranks.
        ranks_per_node: number of consecutive ranks per node; the last node may have fewer.

    Raises:
        ConfigError: if the parallel sizes do not divide the ranks, or a step exceeds `data.prefetch_gib`.
    """
    task = build_task(config)
    state_bytes = {
        stage: _state_bytes(config, world_size, stage) for stage in range(config.parallel.pipeline_parallel_size)
    }
    nodes = [range(first, min(first + ranks_per_node, world_size)) for first in range(0, world_size, ranks_per_node)]
    kinds = {tuple(_kind(task, rank, world_size) for rank in node): None for node in nodes}
    return max((_node_requirements(task, world_size, node, state_bytes) for node in kinds), key=lambda one: one.memory)


def check_node(requirements: HostRequirements, config: RunConfig, size: NodeSize) -> None:
    """Checks that a node has enough memory for the run.

    Args:
        requirements: memory that the node needs.
        config: the run's configuration.
        size: memory that the node has.

    Raises:
        ConfigError: if memory is too small; the message gives the needed and the available memory, and the keys that
            reduce the need.
    """
    if size.shm is not None and requirements.shm > size.shm:
        raise ConfigError(
            f"data: prefetched steps take {requirements.shm / _GIB:.1f} GiB of /dev/shm on a node, but {size.name} has "
            f"{size.shm / _GIB:.1f} GiB. Lower data.prefetch_gib (now {config.data.prefetch_gib:g} per rank), "
            "data.num_workers or data.prefetch_steps, or enlarge /dev/shm (containers: --shm-size)."
        )
    if size.memory is not None and requirements.memory > size.memory:
        raise ConfigError(
            f"this run takes about {requirements.memory / _GIB:.1f} GiB of memory on a node (modelled; `beit3 check` "
            f"lists the parts), but {size.name} has {size.memory / _GIB:.1f} GiB. Lower data.prefetch_gib, "
            "data.num_workers or training.eval_samples, use fewer ranks per node, or leave out "
            "zero_optimization.offload_*."
        )


def describe_host(config: RunConfig, requirements: HostRequirements, ranks_per_node: int, step_seconds: float) -> str:
    """Formats one node's requirements as a table.

    Args:
        config: the run's configuration.
        requirements: requirements of the node.
        ranks_per_node: number of ranks on the node.
        step_seconds: assumed time per step in seconds.
    """
    plan = "prepared and mapped, shared through the page cache"
    unprepared = "in every rank and worker: set data.cache_dir and run `beit3 prepare`"
    kept = config.data.max_open_files
    rates = (
        requirements.records_per_step / step_seconds,
        requirements.images_per_step * _IMAGE_FILE_BYTES / step_seconds / 1e9,
    )
    rows = {
        f"one node of {ranks_per_node} ranks, modelled": f"{requirements.num_workers} data workers",
        "/dev/shm, prefetched steps, GiB": _gib(requirements.shm),
        "memory, rank processes without CUDA, GiB": _gib(requirements.ranks),
        "memory, data workers, GiB": _gib(requirements.workers),
        "memory, validation batches, GiB": _gib(requirements.validation),
        "memory, copy for checkpoints, GiB": _gib(requirements.checkpoint),
        "memory, offloaded state, GiB": f"{_gib(requirements.offloaded)}, {_gib(requirements.pinned)} of it pinned",
        "memory, total with /dev/shm, GiB": _gib(requirements.memory),
        "token maps and indices": unprepared if config.data.cache_dir is None else plan,
        f"file reads per second, {step_seconds:g} s per step": f"{rates[0]:,.0f}",
        "file opens per second": f"at most {rates[0]:,.0f}; none once a worker has its tars open ({kept:,} at most)",
        "file GB per second, 100 kB per image": f"{rates[1]:,.2f}",
    }
    wide = max(map(len, rows))
    return "\n".join(f"{name.ljust(wide)}  {value}" for name, value in rows.items())


class _Kind(NamedTuple):
    """Identifies ranks that need equal host memory: they have the same `stage` and the same `views`."""

    stage: int
    views: ImageViews | None
    """Which resized copies of each image the rank needs; None if the rank reads no data."""


def _kind(task: Task, rank: int, world_size: int) -> _Kind:
    parallel = task.config.parallel
    coords, last = parallel.rank_coords(rank, world_size), parallel.pipeline_parallel_size - 1
    stage = coords.pipeline
    if coords.tensor or stage not in (0, last):
        return _Kind(stage, None)
    return _Kind(stage, task.image_views(embeds=stage == 0, predicts=stage == last))


def _node_requirements(
    task: Task, world_size: int, node: tuple[_Kind, ...], state_bytes: dict[int, tuple[int, int, int]]
) -> HostRequirements:
    config, pairs_per_sample = task.config, task.pairs_per_sample
    data_parallel_size = config.parallel.data_parallel_size(world_size)
    readers = [kind.views for kind in node if kind.views is not None]
    plans = {
        views: plan_prefetch(config, data_parallel_size, views, pairs_per_sample=pairs_per_sample)
        for views in set(readers)
    }
    samples = config.step_shares(data_parallel_size).rank_samples(0)
    images = len(readers) * (samples.images + samples.pairs * pairs_per_sample)
    state, offloaded, pinned = (sum(state_bytes[kind.stage][part] for kind in node) for part in range(3))
    worker_bytes = _WORKER_BYTES + _unpacked_bytes(task, data_parallel_size)
    return HostRequirements(
        shm=sum(plans[views].num_bytes for views in readers),
        ranks=len(node) * _RANK_BYTES,
        workers=sum(plans[views].num_workers * (plans[views].step_bytes + worker_bytes) for views in readers),
        validation=sum(_validation_bytes(task, data_parallel_size, views) for views in readers),
        checkpoint=state,
        offloaded=offloaded,
        pinned=pinned,
        num_workers=sum(plans[views].num_workers for views in readers),
        images_per_step=images,
        records_per_step=images,
    )


def _unpacked_bytes(task: Task, data_parallel_size: int) -> int:
    """Returns the modelled bytes of one micro-batch's samples in a data worker, before packing drops any image."""
    config, views = task.config, task.image_views(embeds=True, predicts=True)
    num_bytes = step_bytes(config, data_parallel_size, views, pairs_per_sample=task.pairs_per_sample)
    return num_bytes // config.gradient_accumulation_steps


def _validation_bytes(task: Task, data_parallel_size: int, views: ImageViews) -> int:
    """Returns the bytes of the images that a rank keeps for the validation loss."""
    config = task.config
    if not task.has_validation_loss:
        return 0
    samples = -(-config.training.loss_samples // data_parallel_size)  # of each kind
    images = samples if config.data.images.validation else 0
    if config.data.pairs.validation:
        images += samples * task.pairs_per_sample
    return images * image_bytes(config, views)


def _state_bytes(config: RunConfig, world_size: int, stage: int) -> tuple[int, int, int]:
    """Returns three sizes in bytes for one rank of a stage: the copy for checkpoints, the offloaded state, and its
    pinned part.
    """
    memory: Memory | ModelState
    if config.backbone is None:
        memory = model_state(config, world_size)
    else:
        rank_model = build_rank_model(config, world_size, stage)
        memory = rank_memory(rank_model, expected_workloads(config, rank_model.data_parallel_size))
    options, on_host = config.options, {}
    if options.offloads_optimizer:
        on_host["offload_optimizer"] = memory.optimizer + memory.gradients
    if options.offloads_parameters:
        on_host["offload_param"] = memory.parameters
    pinned = sum(size for section, size in on_host.items() if options.zero[section].get("pin_memory"))
    return memory.optimizer, sum(on_host.values()), pinned


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:,.1f}"
