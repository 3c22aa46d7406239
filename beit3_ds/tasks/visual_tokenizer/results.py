"""Writes a trained visual tokenizer, its recipe (training settings), and a picture of its codes."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from beit3_ds.config import RunConfig
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.storage_error import StorageError
from beit3_ds.tasks.visual_tokenizer.code_picture import code_picture_path, write_code_picture
from beit3_ds.tasks.visual_tokenizer.config import VisualTokenizerSettings
from beit3_ds.tokenizers import VisualTokenizer
from beit3_ds.tokenizers.recipe import save_with_recipe, visual_recipe
from beit3_ds.tokenizers.visual import serialize_visual_tokenizer


def write_tokenizer(
    config: RunConfig, teacher_description: str, tensors: Mapping[str, Tensor], folder: ResultFolder
) -> dict[str, str]:
    """Writes the tokenizer, its recipe (training settings) and, if possible, a picture of its codes.

    Args:
        config: configuration of the run.
        teacher_description: human-readable description of the teacher.
        tensors: weights and buffers of the trained `TokenizerModel`, by name.
        folder: the run's output folder.

    Returns:
        Paths of the written files, by name.

    Raises:
        StorageError: if the tokenizer or its recipe cannot be written.
    """
    visual, path = config.tokenizers.visual, Path(config.tokenizers.visual.path)
    tokenizer = VisualTokenizer(visual, len(tensors["center"]), teacher_description)
    tokenizer.load_state_dict({name: value for name, value in tensors.items() if name != "center"})
    settings = dataclasses.asdict(config.task.load(VisualTokenizerSettings))
    try:
        save_with_recipe(path, serialize_visual_tokenizer(tokenizer), visual_recipe(config, settings))
    except OSError as error:
        raise StorageError(
            f"the tokenizer {path} cannot be written: {error}. Fix its folder or make room, then start the same "
            "command again: it writes the file from the last checkpoint."
        ) from error
    written = {"visual_tokenizer": str(path)}
    picture = code_picture_path(path)
    draw = functools.partial(write_code_picture, config, tokenizer.eval())
    if folder.write(picture.absolute(), draw):
        written["code_picture"] = str(picture)
    return written
