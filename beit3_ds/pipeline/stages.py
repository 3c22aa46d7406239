"""Divides the ordered list of layers into model chunks, and assigns these to pipeline stages."""

from collections.abc import Sequence
from functools import cache

from beit3_ds.config import RunConfig
from beit3_ds.model.flops import Work, layer_flops
from beit3_ds.patch_grids import window_ranges


def cut_layers(config: RunConfig, head_flops: float) -> list[range]:
    """Divides the layers (embeddings, blocks, head) into `parallel.num_chunks` model chunks of nearly equal cost.

    With S stages, stage s holds chunks s, S + s, 2 S + s, and so on (`stage_layers`). The cost of a layer is its number
    of floating-point operations for the expected tokens of a step.

    Args:
        config: the run's configuration.
        head_flops: floating-point operations of the head per step (`Task.expected_head_flops`).
    """
    return cut(layer_costs(config, head_flops), config.parallel.num_chunks)


def stage_layers(chunks: Sequence[range], stage: int, num_stages: int) -> list[range]:
    """Returns the model chunks of one stage, in the order of the forward pass."""
    return list(chunks[stage::num_stages])


def layer_costs(config: RunConfig, head_flops: float) -> list[float]:
    """Returns the floating-point operations of each layer (embeddings, blocks, head) per step, forward and backward.

    Args:
        config: the run's configuration.
        head_flops: floating-point operations of the head per step, forward and backward (`Task.expected_head_flops`).
    """
    costs = [3 * flops for flops in layer_flops(config.model, _expected_work(config))]
    return [*costs[:-1], head_flops]


def _expected_work(config: RunConfig) -> Work:
    """Returns the numbers of rows, (query, key) pairs and patches in one step, for texts of full length."""
    data, num_patches = config.data, config.model.num_patches
    images, pairs, texts = (stream.samples_per_step for stream in data.streams().values())
    image_length, caption_length, text_length = config.model.image_rows, data.pair_text_length, data.text_length
    rows = (images + pairs) * image_length + pairs * caption_length + texts * text_length
    squares = images * image_length**2 + pairs * (image_length + caption_length) ** 2 + texts * text_length**2
    windows = window_ranges(((config.model.grid_size,) * 2,), config.model.window_size)
    windowed = (
        images * sum((stop - start) ** 2 for ((start, stop),) in windows) if config.model.window_size else squares
    )
    return Work(rows, squares, windowed, (images + pairs) * num_patches, 0.0)


def cut(costs: Sequence[float], num_chunks: int) -> list[range]:
    """Divides a list into consecutive chunks such that the largest chunk cost is as small as possible.

    Among equally good divisions, chooses the one with the smallest sum of squared chunk costs.

    Args:
        costs: cost of each item, at least 0.
        num_chunks: number of chunks, from 1 to the number of items. Each chunk gets at least one item.
    """
    assert 1 <= num_chunks <= len(costs), f"cannot cut {len(costs)} layers into {num_chunks} chunks"
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)

    @cache
    def smallest_maximum(start: int, chunks: int) -> float:
        if chunks == 1:
            return prefix[-1] - prefix[start]
        return min(
            max(prefix[end] - prefix[start], smallest_maximum(end, chunks - 1))
            for end in range(start + 1, len(costs) - chunks + 2)
        )

    limit = smallest_maximum(0, num_chunks) * (1 + 1e-9)

    @cache
    def evenest(start: int, chunks: int) -> tuple[float, tuple[int, ...]]:
        """Divides the items from index `start` on into `chunks` chunks, as evenly as possible. No chunk may cost more
        than `limit`, a variable of `cut`.

        The most even division has the smallest sum of squared chunk costs. Returns this sum and the end of each chunk;
        infinity and an empty tuple if there is no division.
        """
        ends = [len(costs)] if chunks == 1 else range(start + 1, len(costs) - chunks + 2)
        best: tuple[float, tuple[int, ...]] = (float("inf"), ())
        for end in ends:
            own = prefix[end] - prefix[start]
            rest, borders = (0.0, ()) if chunks == 1 else evenest(end, chunks - 1)
            if own <= limit:
                best = min(best, (own * own + rest, (end, *borders)))
        return best

    _, ends = evenest(0, num_chunks)
    return [range(start, end) for start, end in zip((0, *ends), ends, strict=False)]
