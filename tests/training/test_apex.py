"""Tests the choice of apex's FusedAdam with a fake package, because apex itself needs a GPU."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from beit3_ds.config import ConfigError, RunConfig, build_run_config
from beit3_ds.training.optimizer import check_optimizer
from tests.checkpoint.resharding import MOMENTS, Setup, gather_state
from tests.ranks import run_ranks
from tests.run_config import small_run_mapping
from tests.training.layouts import Layout

# Has apex's names, arguments and state: moments per parameter, step count per group.
FUSED_ADAM = """
import torch

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True):
        assert adam_w_mode and bias_correction and not amsgrad
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps,
                                      weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            (first, second), step = group["betas"], group["step"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].lerp_(p.grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                deviation = (state["exp_avg_sq"] / (1 - second**step)).sqrt() + group["eps"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(state["exp_avg"], deviation, value=-group["lr"] / (1 - first**step))
"""


def choose_apex(mapping: dict) -> RunConfig:
    mapping["beit3_ds"]["training"]["optimizer"] = "apex_fused_adam"
    return build_run_config(mapping)


@pytest.fixture
def apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Creates an empty importable package `apex`, which lacks `optimizers` like the package on PyPI."""
    package = tmp_path / "site" / "apex"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(package.parent)
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        del sys.modules[name]


def test_absent_apex_is_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match=r"needs NVIDIA's apex, which is absent.* PyPI's `apex` is an unrelated"):
        check_optimizer(choose_apex(small_run_mapping(1)).training)


def test_the_unrelated_package_is_told_apart(apex: Path) -> None:
    with pytest.raises(ConfigError, match="needs NVIDIA's apex, which is another package"):
        check_optimizer(choose_apex(small_run_mapping(1)).training)
    (apex / "optimizers.py").write_text(FUSED_ADAM)
    check_optimizer(choose_apex(small_run_mapping(1)).training)


def test_misfits_are_refused() -> None:
    mapping = small_run_mapping(1)
    mapping["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    with pytest.raises(ConfigError, match=r"apex_fused_adam.*offload_optimizer"):
        choose_apex(mapping).check_engine()
    mapping = small_run_mapping(0) | {"bf16": {"enabled": True}}
    with pytest.raises(ConfigError, match=r"apex_fused_adam.*Use zero_optimization.stage 1 or 2"):
        choose_apex(mapping).check_engine()
    with pytest.raises(ConfigError, match=r"apex_fused_adam.*stage=3 updates a group in pieces"):
        choose_apex(small_run_mapping(3)).check_engine()


def save_and_load(site: str, root: Path, zero_stage: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Trains on one rank with apex, resumes with torch's AdamW, and the other way round; returns states to compare."""
    sys.path.insert(0, site)
    from apex.optimizers import FusedAdam
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    from tests.checkpoint.resharding import start, train

    ZERO_SUPPORTED_OPTIMIZERS.append(FusedAdam)  # as DeepSpeed does if it can import apex

    class Choice(Setup):
        optimizer = "apex_fused_adam"

        def config(self, seed: int = 1) -> RunConfig:
            config = super().config(seed)
            return dataclasses.replace(
                config, training=dataclasses.replace(config.training, optimizer=type(self).optimizer)
            )

    setup = Choice(Layout(1, 1, 1), zero_stage)
    mesh, schedule, state, store = start(setup, root, seed=1)
    inner = getattr(schedule.engine.optimizer, "optimizer", schedule.engine.optimizer)
    assert type(inner) is FusedAdam
    train(setup, schedule, mesh, range(2))
    assert state.optimizer_step == 2
    store.save(state, 2)
    store.finish()
    saved = gather_state(schedule, mesh, setup)
    train(setup, schedule, mesh, range(2, 4))
    went_on = gather_state(schedule, mesh, setup)

    pairs = {}
    for optimizer in ("adamw", "apex_fused_adam"):
        Choice.optimizer = optimizer
        _, schedule, state, store = start(setup, root, seed=2, mesh=mesh)
        newest = store.agree_on_newest()
        assert newest is not None
        store.load(state, newest)
        assert state.optimizer_step == 2
        loaded = gather_state(schedule, mesh, setup)
        pairs |= {f"{optimizer} loaded {name}": (loaded[name], saved[name]) for name in saved}
        train(setup, schedule, mesh, range(2, 4))
        after = gather_state(schedule, mesh, setup)
        pairs |= {f"{optimizer} after {name}": (after[name], went_on[name]) for name in saved}
    mesh.close()
    return pairs


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_checkpoints_of_both_optimizers_are_the_same(apex: Path, tmp_path: Path, zero_stage: int) -> None:
    """Catches a lost step count, which would restart the bias correction."""
    (apex / "optimizers.py").write_text(FUSED_ADAM)
    (pairs,) = run_ranks(save_and_load, 1, str(apex.parent), tmp_path / "run", zero_stage)
    assert any(moment in name for moment in MOMENTS for name in pairs)
    for name, (ours, expected) in pairs.items():
        tolerance = {"rtol": 0, "atol": 0} if "loaded" in name else {"rtol": 1e-3, "atol": 1e-6}
        torch.testing.assert_close(ours, expected, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
