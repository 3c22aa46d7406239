"""Tests training of the visual tokenizer on several ranks, and resuming after a kill."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_ds.config import ConfigError, ParallelConfig, RunConfig
from beit3_ds.data import View
from beit3_ds.parallel import Mesh
from beit3_ds.runtime.process_group import init_process_group
from beit3_ds.training.tokenizer_checkpoint import TokenizerCheckpoint
from beit3_ds.training.visual_tokenizer import _silent, _Training, train_visual_tokenizer
from tests.ranks import run_ranks
from tests.training.test_visual_tokenizer import SMALL, Views, random_views, run_config

Trained = tuple[dict[str, Tensor], dict[str, Tensor]]

STEPS = {"training_steps": 7, "warmup_steps": 2, "continuous_steps": 3, "save_interval": 2}
BATCH = 8


class KilledError(Exception):
    """Simulates a kill in the middle of a training."""


class ViewsUntil(Views):
    """Raises KilledError when the training asks for a position beyond a limit."""

    def __init__(self, pixels: Tensor, last_position: int) -> None:
        super().__init__(pixels)
        self.last_position = last_position

    def read(self, position: int) -> View:
        if position > self.last_position:
            raise KilledError(position)
        return super().read(position)


def tokenizer_run(folder: Path, **changes: int | float) -> RunConfig:
    return run_config(folder, **(SMALL | STEPS | {"batch_size": BATCH} | changes))


def train(config: RunConfig, views: Views, mesh: Mesh | None) -> Trained:
    """Trains; returns the weights with the codebook, and the gradients of the last step."""
    training = _Training(config, views, mesh, torch.device("cpu"), _silent)
    training.do_steps()
    gradients = {name: p.grad.clone() for name, p in training.tokenizer.named_parameters() if p.grad is not None}
    return {name: value.clone() for name, value in training.tokenizer.state_dict().items()}, gradients


def on_this_rank(function: Callable[..., object], *arguments: object) -> object:
    mesh = init_process_group(ParallelConfig())
    result = function(*arguments, mesh)
    mesh.close()
    return result


def train_with_and_without_continuous_steps(folder: Path, mesh: Mesh | None) -> list[Trained]:
    # Five steps of a small learning rate: rounding must not flip a code, which every later step would inherit.
    short = {"training_steps": 5, "learning_rate": 1e-3}
    configs = [tokenizer_run(folder / str(steps), continuous_steps=steps, **short) for steps in (0, 3)]
    return [train(config, random_views(40), mesh) for config in configs]


def test_two_ranks_train_what_one_does(tmp_path: Path) -> None:
    expected = train_with_and_without_continuous_steps(tmp_path / "one", None)
    for trained in run_ranks(on_this_rank, 2, train_with_and_without_continuous_steps, tmp_path / "two"):
        for (state, gradients), (other_state, other_gradients) in zip(expected, trained, strict=True):
            assert other_gradients.keys() == gradients.keys()
            for name, value in gradients.items():  # AdamW would hide gradients that are summed instead of averaged
                torch.testing.assert_close(other_gradients[name], value, rtol=1e-3, atol=1e-6)
            assert state["quantize.cluster_size"].sum() > 0
            for name, value in state.items():  # catches statistics or k-means over the vectors of one rank alone
                # A key's bias has no gradient but rounding, which AdamW turns into steps.
                torch.testing.assert_close(other_state[name], value, rtol=1e-4, atol=1e-4)


def interrupted_and_whole(folder: Path, mesh: Mesh | None) -> list[dict[str, Tensor]]:
    states = []
    for name, kill_at in (("whole", None), ("killed", 5)):
        config = tokenizer_run(folder / name)
        if kill_at is not None:
            with pytest.raises(KilledError):
                train(config, ViewsUntil(random_views(40).pixels, kill_at * BATCH - 1), mesh)
            assert TokenizerCheckpoint(config).path.exists()
        states.append(train(config, random_views(40), mesh)[0])
    return states


def assert_equal_states(whole: dict[str, Tensor], resumed: dict[str, Tensor]) -> None:
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_a_killed_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    assert_equal_states(*interrupted_and_whole(tmp_path, None))


def test_killed_ranks_go_on_bit_for_bit(tmp_path: Path) -> None:
    for states in run_ranks(on_this_rank, 2, interrupted_and_whole, tmp_path):
        assert_equal_states(*states)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    config = tokenizer_run(tmp_path)
    with pytest.raises(KilledError):
        train(config, ViewsUntil(random_views(40).pixels, 5 * BATCH - 1), None)
    with pytest.raises(ConfigError, match=r"learning_rate from 0\.003 to 0\.1\. Undo"):
        train(tokenizer_run(tmp_path, learning_rate=0.1), random_views(40), None)
    with pytest.raises(ConfigError, match=r"number of training images from 40 to 44\. Undo"):
        train(config, random_views(44), None)  # would be shuffled again, and repeat images of the epoch
    train(tokenizer_run(tmp_path, save_interval=3), random_views(40), None)  # does not affect the training
    TokenizerCheckpoint(config).path.write_bytes(b"no tensors here")
    with pytest.raises(ConfigError, match=r"is not a checkpoint of a tokenizer's training"):
        train(config, random_views(40), None)


def test_a_finished_training_leaves_the_tokenizer_alone(tmp_path: Path) -> None:
    config = tokenizer_run(tmp_path)
    train_visual_tokenizer(config, random_views(40), report=_silent)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["visual.safetensors", "visual.safetensors.recipe.json"]  # no checkpoint to resume at its end


def test_batches_that_do_not_divide_over_ranks_are_refused(tmp_path: Path) -> None:
    group: Any = None  # refused before anything is sent
    mesh = Mesh(data_parallel_group=group, data_parallel_size=3)
    with pytest.raises(ConfigError, match=r"batch_size=8 does not divide over 3 ranks\. Use 6 or 9"):
        _Training(tokenizer_run(tmp_path), random_views(40), mesh, torch.device("cpu"), _silent)


def test_bfloat16_trains_a_float32_codebook(tmp_path: Path) -> None:
    config = tokenizer_run(tmp_path, bf16=True)
    state, _ = train(config, random_views(40), None)
    exact, _ = train(tokenizer_run(tmp_path / "exact"), random_views(40), None)
    assert all(value.dtype != torch.bfloat16 for value in state.values())
    assert not torch.equal(
        state["encoder.norm.weight"], exact["encoder.norm.weight"]
    )  # catches a switch without effect
    torch.testing.assert_close(state["quantize.weight"].norm(dim=-1), torch.ones(16))
