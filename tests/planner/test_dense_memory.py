"""Tests the predicted memory and operations of a model for images of any size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_ds.config import load_run_config
from beit3_ds.data.packing import pack_grids
from beit3_ds.model.flops import attention_flops, layer_flops, work_of
from beit3_ds.pipeline.stages import layer_costs
from beit3_ds.planner import build_rank_model, expected_workloads
from beit3_ds.planner.memory import block_activations
from tests.model.dense.dense_models import build_dense, random_images
from tests.tasks.toy_dense.test_toy_dense import write_config


@pytest.mark.parametrize("relative_positions", [False, True])
def test_kept_activations_are_as_modelled(relative_positions: bool, tmp_path: Path) -> None:
    """Catches CLS rows that do not exist, a last FFN on some rows only, and a wrong width of relative positions."""
    config = load_run_config(
        write_config(tmp_path),
        [f"model.dense.relative_positions={str(relative_positions).lower()}", "model.drop_path_rate=0"],
    )
    rank_model = build_rank_model(config, 1)
    (workload,) = expected_workloads(config, 1)
    chunk = rank_model.chunks[0]
    modelled = sum(
        block_activations(rank_model, chunk, layer, workload, "none") for layer in rank_model.blocks_of(chunk)
    )
    model = build_dense(config.model)
    grid = (config.model.grid_size,) * 2
    batch = pack_grids(random_images((grid,) * workload.images, config.model.patch_size), config.model.patch_size)
    x_TD = model.run_layers(batch, layers=range(1)).detach().requires_grad_()
    assert workload.rows == batch.num_rows
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own and x.dtype.is_floating_point:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    alive: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        alive.append(model.run_layers(batch, x_TD, range(1, 1 + config.model.num_layers)))
    assert sum(kept.values()) == pytest.approx(modelled, rel=0.05)


def test_blocks_with_windows_need_fewer_operations(tmp_path: Path) -> None:
    config = load_run_config(write_config(tmp_path))
    model = config.model
    batch = pack_grids(random_images(((4, 4), (3, 5)), model.patch_size), model.patch_size)
    _, windowed, whole, _ = layer_flops(model, work_of(batch, 0.0, model.window_size))
    # Windows of 2 x 2 patches: four whole ones; two whole ones, and at the border 2 x 1, twice 1 x 2, and 1 x 1.
    pairs = (4 + 2) * 16 + 3 * 4 + 1
    assert whole - windowed == attention_flops(model, 31, 16**2 + 15**2) - attention_flops(model, 31, pairs)
    embeddings, block, other, _ = layer_costs(config, 0.0)
    assert embeddings < block < other
