"""Saves and loads the state of the visual tokenizer's training, in one file beside the tokenizer."""

import pickle
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from beit3_ds.atomic_file import atomic_write
from beit3_ds.config import ConfigError, RunConfig
from beit3_ds.tokenizers import VisualTokenizer
from beit3_ds.tokenizers.recipe import find_changes, visual_recipe

_NUM_IMAGES = "number of training images"


class Restored(NamedTuple):
    """Holds the rest of a checkpoint; weights, codebook and optimizer state are loaded in place."""

    step: int
    """Number of updates done."""
    center: Tensor
    """Mean of the teacher's features, (E,)."""
    broken_records: dict[str, str]
    """Broken images found so far (`broken_records.BrokenRecords.state`)."""


class TokenizerCheckpoint:
    """Manages the checkpoint file `PATH.training.pt`.

    The file holds step, weights, codebook, optimizer state and the mean of the teacher's features. It holds no random
    state, because the seed and the step determine the order and crops of the images. It holds only tensors and plain
    values, and is read with `weights_only`.

    Args:
        config: the configuration; settings that affect the training are saved in the file and compared on loading.
        num_images: number of training images, which determines their order; None skips the comparison.
    """

    def __init__(self, config: RunConfig, num_images: int | None = None) -> None:
        visual = config.tokenizers.visual
        self.path = Path(f"{visual.path}.training.pt")
        self._recipe = visual_recipe(config)
        if num_images is not None:
            self._recipe[_NUM_IMAGES] = num_images

    def save(
        self,
        step: int,
        tokenizer: VisualTokenizer,
        optimizer: Optimizer,
        center: Tensor,
        broken_records: dict[str, str],
    ) -> None:
        """Writes the state after `step` updates; a kill during the write leaves the previous file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {"step": step, "recipe": self._recipe, "center": center, "broken_records": broken_records}
        state |= {"tokenizer": tokenizer.state_dict(), "optimizer": optimizer.state_dict()}
        with atomic_write(self.path) as file:
            torch.save(state, file)

    def load(self, tokenizer: VisualTokenizer, optimizer: Optimizer) -> Restored | None:
        """Restores weights, codebook and optimizer, if there is a checkpoint.

        Returns:
            Rest of the checkpoint; None if there is no checkpoint.

        Raises:
            ConfigError: if the file is not a checkpoint or has another recipe.
        """
        if not self.path.exists():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            recipe = state["recipe"]
        except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise ConfigError(
                f"tokenizers.visual: {self.path} is not a checkpoint of a tokenizer's training ({error}). Delete it."
            ) from error
        self._check_recipe(recipe)
        tokenizer.load_state_dict(state["tokenizer"])
        optimizer.load_state_dict(state["optimizer"])
        return Restored(int(state["step"]), state["center"], state.get("broken_records", {}))

    def remove(self) -> None:
        """Deletes the file once the tokenizer is finished."""
        self.path.unlink(missing_ok=True)

    def _check_recipe(self, recipe: dict[str, object]) -> None:
        if changes := find_changes(recipe, self._recipe):
            raise ConfigError(
                f"tokenizers.visual: {self.path} was saved by a training with another recipe: {changes}. Undo the "
                f"change to resume from it, or delete the file to start again."
            )
