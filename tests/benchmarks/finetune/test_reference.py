"""Tests that the reference computes the same loss and gradients as this project from the same weights and samples."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from beit3_ds.benchmarks.finetune import decoding, reference
from beit3_ds.benchmarks.finetune.cases import CASES, case_config, draw_samples, pack_samples
from beit3_ds.benchmarks.finetune.reference import ReferenceTrainer
from beit3_ds.benchmarks.finetune.training import loss_factors, step_loss_of
from beit3_ds.config import RunConfig
from beit3_ds.model import TaskModel, initialize_parameters
from beit3_ds.weights.export import export_weights
from tests.benchmarks.code_hash import code_hash
from tests.weights.models import ModelReader

HASHES = {
    reference: "6c2ffcc30de47b43e54df53c9b51553c21327c56a419c65f3dfaa7199c1640ab",
    decoding: "1f55cd656885a4467360ba65b81cd3b1c26e25475da37401f2047cb6f0b22081",
}


@pytest.mark.parametrize("module", HASHES, ids=lambda module: module.__name__)
def test_the_reference_is_not_slowed(module: ModuleType) -> None:
    """Catches changes of the reference's code, after which old and new ratios in BENCHMARKS.md are not comparable.

    After such a change, measure before and after it, report it in BENCHMARKS.md, and update the hash here.
    """
    assert code_hash(module) == HASHES[module]


def small_config(task: str) -> RunConfig:
    config = case_config(task, "tiny", 64, num_layers=2, drop_path_rate=0.0)
    return replace(config, backbone=replace(config.model, text_vocab_size=301))


@pytest.mark.parametrize("task", CASES)
def test_both_sides_compute_the_same(task: str, tmp_path: Path) -> None:
    config = small_config(task)
    samples = draw_samples(task, config, 0, 3)
    ours = TaskModel(CASES[task].build_head, config.model)
    initialize_parameters(ours, config.model, seed=3)
    trainer = ReferenceTrainer(task, config, torch.device("cpu"))
    export_weights(ModelReader(ours), tmp_path / "weights.pth", format="unilm-dual")
    state = torch.load(tmp_path / "weights.pth", weights_only=True)["model"]
    trainer.model.load_state_dict(state, strict=True)

    batch = pack_samples(task, config, samples, 0)
    factors, step_loss = loss_factors(task, batch), step_loss_of(task)
    output = ours(batch, factors)
    loss = output.total if step_loss is None else step_loss(output) @ factors
    loss.backward()
    theirs = trainer.model(samples)
    theirs.backward()
    assert theirs.item() == pytest.approx(loss.item(), rel=1e-4)
    norms = [
        float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        for model in (ours, trainer.model)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


@pytest.mark.parametrize("task", CASES)
def test_the_reference_trains(task: str) -> None:
    config = small_config(task)
    config = replace(config, training=replace(config.training, learning_rate=2e-4))
    trainer, samples = ReferenceTrainer(task, config, torch.device("cpu")), draw_samples(task, config, 0, 2)
    losses = [trainer.step(samples) for _ in range(8)]
    assert losses[-1] < losses[0]
