"""Tests that a run under any layout starts from the weights in a file."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from beit3_ds.config import ConfigError
from beit3_ds.config.task import TaskConfig
from beit3_ds.model import initialize_parameters
from beit3_ds.model.pretrained import weights_metadata
from beit3_ds.tasks.pretraining.model import PretrainingModel
from tests.checkpoint.resharding import Setup, gather_state, start
from tests.checkpoint.test_resharding import FEW
from tests.ranks import run_ranks


def begin(setup: Setup, weights: Path, folder: Path) -> dict[str, Tensor]:
    """Loads the weights and returns the engine state of one rank."""
    from beit3_ds.training.init_from import InitialWeights

    mesh, schedule, state, _ = start(setup, folder, seed=1)
    config = setup.config()
    training = dataclasses.replace(
        config.training, seed=0
    )  # that of `from_pretrained`, for tensors that the file lacks
    InitialWeights(weights, dataclasses.replace(config, training=training)).load(state)
    found = gather_state(schedule, mesh, setup, kinds=("weight",))
    mesh.close()
    return found


def write_weights(path: Path, setup: Setup, **changes: object) -> dict[str, Tensor]:
    """Writes exported weights that differ from the run's initial values; the file lacks the MIM head."""
    from safetensors.torch import save_file

    config = dataclasses.replace(setup.config().model, **changes)  # type: ignore[arg-type]
    model = PretrainingModel(config)
    initialize_parameters(model, config, seed=77)
    tensors = {name: p.detach() + 0.01 for name, p in model.named_parameters() if not name.startswith("heads.mim")}
    save_file(tensors, path, metadata=weights_metadata(config, 5))
    return tensors


@pytest.mark.parametrize("setup", FEW[1:3], ids=str)
def test_engine_holds_the_weights(setup: Setup, tmp_path: Path) -> None:
    expected = write_weights(tmp_path / "weights.safetensors", setup)
    found: dict[str, Tensor] = {}
    for rank in run_ranks(begin, setup.layout.num_ranks, setup, tmp_path / "weights.safetensors", tmp_path):
        found |= rank
    for kind in ("weight", "used"):
        for name, tensor in expected.items():
            assert torch.equal(found[f"{kind} {name}"], tensor), f"{kind} {name}"
        assert float(found[f"{kind} heads.mim.bias"].abs().max()) == 0  # left as it was


def test_engine_holds_adapted_weights(tmp_path: Path) -> None:
    """Checks weights from a model with other text lengths, image sizes and experts.

    Two ranks of ZeRO-3 read the weights in parts.
    """
    from beit3_ds.training.init_from import InitialWeights

    setup, path = FEW[1], tmp_path / "weights.safetensors"
    model = setup.config().model
    write_weights(path, setup, max_text_length=9, image_size=model.image_size * 2, num_vision_language_layers=0)
    found: dict[str, Tensor] = {}
    for rank in run_ranks(begin, setup.layout.num_ranks, setup, path, tmp_path):
        found |= rank
    settings = {name: getattr(model, name) for name in ("image_size", "max_text_length", "num_vision_language_layers")}
    with pytest.warns(UserWarning, match=r"heads\.mim"):
        expected = dict(PretrainingModel.from_pretrained(path, **settings).named_parameters())
    for name, tensor in expected.items():
        if not name.startswith("heads.mim"):
            assert torch.equal(found[f"weight {name}"], tensor), name
    line = InitialWeights(path, setup.config()).describe()
    assert line.startswith(f"starts from the weights of {path}; positions of ")
    assert "initial values for text positions 9 to" in line and "copied from their vision experts" in line
    assert line.endswith("; initial values for heads.mim")


def test_a_task_gets_a_new_head_or_keeps_its_own(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from beit3_ds.training.init_from import InitialWeights

    task, path = "tests.tasks.rotation", tmp_path / "weights.safetensors"
    config = FEW[0].config()
    empty = dataclasses.replace(config.data.pairs, train=(), validation=(), samples_per_step=0)
    data = dataclasses.replace(config.data, pairs=empty, texts=empty)
    untied = dataclasses.replace(config.model, tie_word_embeddings=False)
    own = dataclasses.replace(config, backbone=untied, data=data, task=TaskConfig(name=task))
    tensors = write_weights(path, FEW[0])  # with a tied word table, which the head does not need
    assert InitialWeights(path, own).describe().endswith("; initial values for heads.turn")
    tensors |= {"heads.turn.weight": torch.ones(4, config.model.hidden_size), "heads.turn.bias": torch.ones(4)}
    save_file(tensors, path, metadata=weights_metadata(untied, 5, {"name": task}))
    continued = InitialWeights(path, own)
    assert continued.describe().endswith(f"; with the head of {task}")
    assert not continued.absent and "heads.turn.weight" in continued._names


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_weights_of_another_task_are_refused(task: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from beit3_ds.training.init_from import InitialWeights

    path, config = tmp_path / "weights.safetensors", FEW[0].config()
    write_weights(path, FEW[0])
    InitialWeights(path, config)
    save_file(load_file(path), path, metadata=weights_metadata(config.model, 5, {"name": task, "num_answers": 3}))
    with pytest.raises(
        ConfigError, match=rf"task {task}, but the task of this run is pretraining.*--no-heads"
    ) as error:
        InitialWeights(path, config)
    assert str(path) in str(error.value)


def test_other_model_is_refused(tmp_path: Path) -> None:
    from beit3_ds.training.init_from import InitialWeights

    write_weights(tmp_path / "weights.safetensors", FEW[0], num_layers=5)
    with pytest.raises(ConfigError, match=r"holds another model: num_layers 5 there, 4 here\. Set the model section"):
        InitialWeights(tmp_path / "weights.safetensors", FEW[0].config())
