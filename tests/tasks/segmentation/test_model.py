"""Tests the whole segmentation model: precision, empty batches, parameter groups, and windows in the trunk."""

import dataclasses
from pathlib import Path

import pytest
import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.config import load_run_config
from beit3_ds.model.parameter_groups import decays
from beit3_ds.tasks import build_task
from beit3_ds.tasks.segmentation.model import SegmentationModel
from beit3_ds.tasks.segmentation.packing import label_targets, pack_windows
from tests.gradient_order import gradient_order
from tests.tasks.segmentation.label_files import write_config

CHANGES = {"adapter": (), "no adapter": ("task.adapter=null", "model.final_norm=true")}


def _model(folder: Path, *changes: str) -> SegmentationModel:
    task = build_task(load_run_config(write_config(folder, data=folder), list(changes)))
    model = task.build_model()
    assert isinstance(model, SegmentationModel)
    model.initialize(1)
    return model


def _batch(count: int = 2) -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (count, 4, 4), generator=generator, dtype=torch.uint8)
    labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)
    views = [torch.rand(3, 64, 64, generator=generator) * 2 - 1 for _ in range(count)]
    targets, host_targets = label_targets(labels.numpy(), range(count))
    batch = pack_windows(views, 16)
    return dataclasses.replace(batch, targets=targets, host_targets=host_targets, term_counts=(1, 1, 1))


@pytest.mark.parametrize("kind", CHANGES)
def test_bf16_is_near_float32(kind: str, tmp_path: Path) -> None:
    """Compares a model cast to bf16, as DeepSpeed does, with float32; the head runs in autocast."""
    model, factors = _model(tmp_path, *CHANGES[kind]), torch.ones(3)
    expected = model(_batch(), factors).sums
    output = model.bfloat16()(_batch(), factors)
    output.total.backward()
    torch.testing.assert_close(output.sums, expected, rtol=0.03, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", CHANGES)
def test_an_empty_batch_gives_zero_and_every_gradient(kind: str, tmp_path: Path) -> None:
    """Catches a parameter without gradient, which ZeRO-3 would update with the gradient of an earlier step."""
    model = _model(tmp_path, *CHANGES[kind])
    output = model(_batch(0), torch.ones(3))
    output.total.backward()
    assert output.sums.tolist() == [0, 0, 0]
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert model(pack_windows([], 16), None).shape[0] == 0


@pytest.mark.parametrize("kind", CHANGES)
def test_the_order_of_gradients_does_not_depend_on_the_images(kind: str, tmp_path: Path) -> None:
    model = _model(tmp_path, *CHANGES[kind])
    orders = [gradient_order(model, lambda count=count: model(_batch(count), torch.ones(3)).total) for count in (0, 3)]
    assert len(orders[0]) == len(list(model.parameters())) and orders[0] == orders[1]


@pytest.mark.parametrize("kind", CHANGES)
def test_norms_biases_and_vectors_do_not_decay(kind: str, tmp_path: Path) -> None:
    names = {name: parameter.dim() for name, parameter in _model(tmp_path, *CHANGES[kind]).named_parameters()}
    assert not [name for name, dims in names.items() if dims == 1 and decays(name)]
    assert not [name for name in names if decays(name) and ("level_embed" in name or "queries_embedder" in name)]
    assert len([name for name in names if decays(name)]) > 20


def test_windows_in_the_trunk_keep_the_places_of_patches(tmp_path: Path) -> None:
    """Checks that ordering rows by windows changes nothing if all blocks are global."""
    plain = _model(tmp_path)
    windowed = _model(tmp_path, 'model.dense={"window_size": 3, "global_blocks": [0, 1]}')
    sums = [model(_batch(), torch.ones(3)).sums for model in (plain, windowed)]
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=0)


def test_recomputing_changes_nothing(tmp_path: Path) -> None:
    gradients = []
    for mode in ("none", "full"):
        model = _model(tmp_path, f"training.activation_checkpointing={mode}")
        model(_batch(), torch.ones(3)).total.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
