"""Tests that a checkpoint of another model or tokenizer is refused, and that changed settings are printed."""

from pathlib import Path
from typing import Any

import pytest

from beit3_ds.checkpoint.folder import CheckpointFolder
from beit3_ds.checkpoint.run_description import RunDescription
from beit3_ds.config import ConfigError
from tests.checkpoint.saved_steps import NEWEST, edit_index, folder
from tests.checkpoint.small_state import SmallRun, describe


def refusal(root: Path, **changes: Any) -> str:
    """Returns the error with which a run with another description refuses the newest checkpoint."""
    run = SmallRun(root, **changes)
    with pytest.raises(ConfigError) as caught:
        run.resume()
    assert run.state.optimizer_step == 0 and not any(part.any() for part in run.state.tensors()), "something was loaded"
    return str(caught.value)


def test_another_model_is_refused(root: Path) -> None:
    model = {**describe().model, "hidden_size": 4, "num_heads": 2}
    message = refusal(root, model=model)
    assert str(folder(root)) in message
    assert "hidden_size 3 there, 4 here" in message
    assert "num_heads null there, 2 here" in message
    assert "num_layers" not in message


@pytest.mark.parametrize("stored", [[0, "float32", [2, 3]], [0, "bfloat16", [3, 2]], None])
def test_another_buffer_is_refused(root: Path, stored: list[Any] | None) -> None:
    """Checks a buffer with another shape or dtype, and one that is missing in the checkpoint."""

    def change(content: dict[str, Any]) -> None:
        del content["buffers"]["codes.weight"]
        content["buffers"] |= {"codes.weight": stored} if stored else {}

    edit_index(root, change, with_digest=True)
    assert "the buffer codes.weight is" in refusal(root)


def test_another_shape_is_refused(root: Path) -> None:
    """Checks a tensor of another shape, although the model's configuration is equal."""

    def reshape(content: dict[str, Any]) -> None:
        content["tensors"]["norm.weight"]["shape"] = [5, 1]

    edit_index(root, reshape, with_digest=True)
    assert "norm.weight has shape torch.Size([5, 1]), the model's is torch.Size([5])" in refusal(root)


@pytest.mark.parametrize("kind", ["text", "visual"])
def test_another_tokenizer_is_refused(root: Path, kind: str) -> None:
    message = refusal(root, tokenizers={**describe().tokenizers, kind: "ef" * 32})
    assert str(folder(root)) in message
    assert f"another {kind} tokenizer than tokenizers.{kind}.path" in message


def test_changed_settings_are_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {**describe().model, "drop_path_rate": 0.2}  # changes no tensor
    assert SmallRun(root, model=model, config={"training": {"seed": 2}}).resume() == NEWEST
    assert "training.seed: 1 -> 2" in capsys.readouterr().out


def test_all_fields_of_the_description_are_kept(root: Path) -> None:
    kept = CheckpointFolder(folder(root)).index.run
    assert kept == describe() and set(vars(kept)) == set(RunDescription.__dataclass_fields__)
