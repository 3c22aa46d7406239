"""Tests that one device loads from an exported file what several ranks trained."""

from pathlib import Path

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.tasks.pretraining.heads import Logits
from beit3_ds.tasks.pretraining.model import PretrainingModel
from beit3_ds.weights.export import export_weights
from beit3_ds.weights.reader import open_weights
from tests.batches import random_batch
from tests.checkpoint.resharding import Setup, start, train
from tests.ranks import run_ranks
from tests.training.layouts import Layout

SETUP = Setup(Layout(2, 2, 1, sequence_parallel=True), 3)


def train_and_predict(folder: Path) -> Logits | None:
    """Trains, saves and runs a forward pass on one rank; the last stage returns the logits."""
    mesh, schedule, state, store = start(SETUP, folder, seed=1)
    train(SETUP, schedule, mesh, range(2))
    store.save(state, 2)
    store.finish()
    ((_, logits),) = schedule.run_forward([batch()], None, lambda b: b)
    mesh.close()
    return logits if isinstance(logits, Logits) else None


def batch() -> PackedBatch:
    return random_batch(SETUP.config().model, 2, 2, 2, seed=9)


@torch.no_grad()
def test_exported_model_equals_the_ranks(tmp_path: Path) -> None:
    ranks = run_ranks(train_and_predict, SETUP.layout.num_ranks, tmp_path)
    expected = next(logits for logits in reversed(ranks) if logits is not None)
    export_weights(open_weights(tmp_path), tmp_path / "model.safetensors")
    found = PretrainingModel.from_pretrained(tmp_path / "model.safetensors")(batch(), None)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Compares tensors up to 1e-6 of the largest logit; a wrong shard or a lost update would differ by far more."""
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= 1e-6 * float(theirs.abs().max())
