"""Tests learning rates, weight decay and loss factors."""

import pytest
import torch

from beit3_ds.model.parameter_groups import decays
from beit3_ds.tasks import Term
from beit3_ds.tasks.pretraining.model import PretrainingModel
from beit3_ds.training.learning_rate import learning_rate
from beit3_ds.training.loss import build_loss_factors
from beit3_ds.training.optimizer import build_optimizer
from tests.batches import decoupled, small_model_config
from tests.run_config import small_run_config


def test_learning_rate_warms_up_and_ends_at_the_minimum() -> None:
    training = small_run_config(0).training
    rates = [learning_rate(training, step) for step in range(training.total_steps)]
    assert rates[0] == pytest.approx(training.learning_rate / training.warmup_steps)  # not 0: the first step counts
    assert rates[training.warmup_steps - 1] == pytest.approx(training.learning_rate)
    assert rates[-1] == pytest.approx(training.min_learning_rate)
    middle = (training.warmup_steps + training.total_steps) // 2 - 1
    assert rates[middle] == pytest.approx(training.learning_rate / 2, rel=0.01)
    falling = rates[training.warmup_steps :]
    assert falling == sorted(falling, reverse=True)


def test_decay_reaches_matrices_only() -> None:
    for config in (small_model_config(), decoupled()):
        model = PretrainingModel(config)
        for name, parameter in model.named_parameters():
            table = name.endswith(("_position",))
            assert decays(name) == (parameter.dim() >= 2 and not table), name
        groups = build_optimizer(model, small_run_config(0)).param_groups
        assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_loss_factors_undo_the_average_over_ranks() -> None:
    weights = {"image_mim": 1.0, "text_mlm": 1.0, "pair_mim": 1.0, "pair_mlm": 2.0}
    terms = [Term(name, stream="images", title=name, weight=weight) for name, weight in weights.items()]
    factors = build_loss_factors(torch.tensor([4, 5, 0, 8]), terms, data_parallel_size=2)
    torch.testing.assert_close(factors, torch.tensor([2 / 4, 2 / 5, 0.0, 2 * 2 / 8]))  # a term without positions is 0
