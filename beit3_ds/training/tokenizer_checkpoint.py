"""The state of an unfinished training of the visual tokenizer: one file beside the tokenizer's own."""

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
    """Content of a checkpoint beside weights, codebook and optimizer state, which are loaded in place."""

    step: int
    """Updates done."""
    center: Tensor
    """Mean of the teacher's features."""
    broken_records: dict[str, str]
    """Broken images found so far (`broken_records.BrokenRecords.state`)."""


class TokenizerCheckpoint:
    """The file `PATH.training.pt`: step, weights, codebook, optimizer state and the mean of the teacher's features.

    Nothing random is saved, because the order of images and their crops follow from the seed and the step. It holds
    tensors and plain values only and is read with `weights_only`.

    Args:
        config: the run; settings that the training depends on are kept in the file and compared when it is read.
        num_images: number of training images, which decides their order; None skips the comparison.
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
        """Writes the state after `step` updates; a killed run leaves a complete file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {"step": step, "recipe": self._recipe, "center": center, "broken_records": broken_records}
        state |= {"tokenizer": tokenizer.state_dict(), "optimizer": optimizer.state_dict()}
        with atomic_write(self.path) as file:
            torch.save(state, file)

    def load(self, tokenizer: VisualTokenizer, optimizer: Optimizer) -> Restored | None:
        """Restores weights, codebook and optimizer, if there is a checkpoint.

        Returns:
            The rest of the checkpoint's content; None if there is no checkpoint.

        Raises:
            ConfigError: if the file is not a checkpoint, or one of another recipe.
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
                f"change to go on from it, or delete the file to start anew."
            )
