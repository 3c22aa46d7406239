"""Computes how many steps a rank's data workers may prepare ahead within a limit on shared memory."""

from dataclasses import dataclass
from typing import Literal

from beit3_ds.config.run import RunConfig
from beit3_ds.config.strict import ConfigError

ImageViews = Literal["both", "model", "tokenizer", "neither"]
"""Resized copies of an image that a rank needs: one for the model, one for the visual tokenizer, both, or neither."""

_GIB = 1 << 30
_CHANNELS, _ID_BYTES = 3, 8  # ids are sent as int64
_TASKS_OF_BYTES = ("pretraining", "visual_tokenizer")
"""Tasks whose data workers send pixels as uint8. The workers of other tasks send float32 (`data.images.one_view`)."""
_PATCH_BYTES = 1 + 2 * _ID_BYTES  # the mask, and two int64 positions if masked


@dataclass(frozen=True, kw_only=True)
class PrefetchPlan:
    """Holds the number of data workers of one rank and the number of steps that they prepare ahead."""

    step_bytes: int
    """Size of one prepared step of one rank in bytes."""
    num_workers: int
    """Number of data worker processes. With 0, the training process prepares the steps, without shared memory."""
    steps_per_worker: int
    """Number of steps that each data worker prepares ahead."""

    @property
    def num_bytes(self) -> int:
        """Returns the maximum shared memory for one rank's prefetched steps, in bytes."""
        return self.num_workers * self.steps_per_worker * self.step_bytes


def plan_prefetch(
    config: RunConfig, data_parallel_size: int, views: ImageViews = "both", *, pairs_per_sample: int = 1
) -> PrefetchPlan:
    """Computes the numbers of data workers and prefetched steps per rank within the limit `data.prefetch_gib`.

    Args:
        config: the run's configuration.
        data_parallel_size: number of data-parallel ranks, which divide each step.
        views: which resized copies of each image the rank needs.
        pairs_per_sample: number of image-text pairs per sample of `data.pairs`; 2 for NLVR2.

    Raises:
        ConfigError: if `data.num_workers` is not 0 and a single step exceeds the limit.
    """
    data = config.data
    num_bytes = step_bytes(config, data_parallel_size, views, pairs_per_sample=pairs_per_sample)
    if data.num_workers == 0:
        return PrefetchPlan(step_bytes=num_bytes, num_workers=0, steps_per_worker=0)
    num_fitting = int(data.prefetch_gib * _GIB // num_bytes)
    if num_fitting == 0:
        raise ConfigError(
            f"data.prefetch_gib={data.prefetch_gib:g} is too small for a step of one rank, which takes "
            f"{num_bytes / _GIB:.2f} GiB of shared memory. Raise it, use more ranks, or set data.num_workers=0."
        )
    num_steps = min(data.num_workers * data.prefetch_steps, num_fitting)
    num_workers = min(data.num_workers, num_steps)
    return PrefetchPlan(step_bytes=num_bytes, num_workers=num_workers, steps_per_worker=num_steps // num_workers)


def step_bytes(
    config: RunConfig, data_parallel_size: int, views: ImageViews = "both", *, pairs_per_sample: int = 1
) -> int:
    """Returns the modelled size, in bytes, of one prepared step of data-parallel rank 0.

    Does not count the label maps and masks of dense tasks. They usually take less than a tenth as many bytes as the
    pixels.

    Args:
        config: the run's configuration.
        data_parallel_size: number of data-parallel ranks, which divide each step.
        views: which resized copies of each image the rank needs.
        pairs_per_sample: number of image-text pairs per sample of `data.pairs`; 2 for NLVR2.
    """
    images, pairs, texts = config.step_shares(data_parallel_size).rank_samples(0)
    pairs *= pairs_per_sample
    data, model = config.data, config.backbone
    # Counts an id, a position and a target per token, which is the most that a task adds.
    tokens = 3 * (pairs * data.pair_text_length + texts * data.text_length)
    draws = (images + pairs + texts) * model.num_layers * 2 * 4 if model is not None and model.drop_path_rate else 0
    num_patches = config.tokenizers.visual.grid_size**2 if model is None else model.num_patches
    per_image = image_bytes(config, views) + num_patches * _PATCH_BYTES
    return int((images + pairs) * per_image + tokens * _ID_BYTES + draws) + 1


def image_bytes(config: RunConfig, views: ImageViews = "both") -> int:
    """Returns the total size, in bytes, of the resized copies of an image.

    Args:
        config: the run's configuration.
        views: which resized copies to count.
    """
    pixel_bytes = 1 if config.task.name in _TASKS_OF_BYTES else 4
    sizes = {"tokenizer": config.tokenizers.visual.image_size}
    if config.backbone is not None:
        sizes["model"] = config.backbone.image_size
    return sum(_CHANNELS * pixel_bytes * size**2 for view, size in sizes.items() if views in ("both", view))
