"""Reads weights in the format of BEiT-3's reference code (unilm), as tensors with this project's names.

Names and shapes follow unilm's code. This reader was never tested with the official files. The model has the layout
`decoupled` (`ModelConfig.layout`), unless this program exported the file.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3_ds.config import ConfigError, ModelConfig
from beit3_ds.model import TaskModel
from beit3_ds.model.pretrained import EXTRA_PREFIX, IMAGE_POSITION, check_tensors, matrix_part
from beit3_ds.positions import interpolate_positions
from beit3_ds.tasks.vqa.answers import AnswerVocabulary
from beit3_ds.untrusted_file import read_tensors_with_note
from beit3_ds.weights.export_note import NOTE_KEY, ExportNote, parse_note
from beit3_ds.weights.unilm_heads import (
    LOG_SCALE_KEY,
    HeadBuilder,
    head_builder,
    head_keys,
    import_log_scale,
    recognise_task,
)
from beit3_ds.weights.unilm_names import (
    POSITION_TABLES,
    TEXT_POSITION,
    TOKENS,
    UNUSED_POSITIONS,
    read_architecture,
    reference_branches,
    reference_keys,
)


class ReleasedFile:
    """Reads a weights file in unilm's format (pretrained or fine-tuned), tensor by tensor on demand.

    A head for VQAv2, NLVR2, captioning, retrieval or ImageNet becomes this project's head for the task. A tensor that
    this project does not use is named `EXTRA_PREFIX` plus its key in the file. A file that this program exported
    contains a note with the model's configuration (`exported_model`).

    Attributes:
        path: path of the file.
        model: configuration of the model, from the note or, without a note, from the tensors' shapes. A requested image
            size replaces the file's image size.
        step: number of training steps before the weights were saved; 0 if unknown.
        task: name and settings of the head's task (`recognise_task`).
        description: format of the file in words, such as "weights exported as unilm-dual".
    """

    def __init__(self, path: str | Path, *, image_size: int | None = None) -> None:
        """Reads and checks the names and shapes of the file's tensors.

        Args:
            path: a file that `untrusted_file.read_tensors` accepts.
            image_size: side of the images in pixels; None selects the image size of the model in the file. For another
                size, position embeddings are interpolated as in unilm's fine-tuning code.

        Raises:
            ConfigError: if the file cannot be read, contains objects that could run code, or has another format.
        """
        self.path = Path(path)
        tensors, text = read_tensors_with_note(self.path, NOTE_KEY)
        note = parse_note(text, str(path)) if text else None
        if note is None:
            self.step, self.description = 0, "released weights (unilm's format)"
            stored = read_architecture({key: tensor.shape for key, tensor in tensors.items()}, str(path))
        else:
            self.step, self.description = note.step, f"weights exported as {note.format}"
            stored = exported_model(note)
        has_extras = note is None or note.has_extras
        self._tensors = _by_logical_name(tensors, stored, str(path), has_extras=has_extras)
        self.model: ModelConfig = stored if image_size is None else dataclasses.replace(stored, image_size=image_size)
        found = {name: x.shape for name, x in self._tensors.items() if not name.startswith(EXTRA_PREFIX)}
        recognised = recognise_task(found)
        self.task: Mapping[str, Any] = recognised if note is None or note.task is None else note.task
        check_tensors(str(path), found, _parameter_shapes(stored, head_builder(recognised)))

    def name_answers(self, path: Path) -> None:
        """Stores the list of VQAv2 answers in `self.task` ("answers"), because unilm's weights do not contain it.

        Args:
            path: unilm's `answer2label.txt`, or the `answers.jsonl` of a run.

        Raises:
            ConfigError: if the weights have no VQAv2 head, if the list cannot be read, or if the list and the head have
                different lengths.
        """
        if self.task["name"] != "vqa":
            raise ConfigError(
                f"{self.path} holds weights of the task {self.task['name']}, which has no list of answers. Leave the "
                "list out."
            )
        answers, count = list(AnswerVocabulary.load(path)), len(self._tensors["heads.answers.bias"])
        if len(answers) != count:
            raise ConfigError(
                f"{path} has {len(answers)} answers, but the head in {self.path} has {count}. Use the list of the "
                "training files of these weights."
            )
        self.task = {**self.task, "answers": answers}

    def names(self) -> list[str]:
        """Returns this project's names of all tensors, including tensors with the prefix `EXTRA_PREFIX`."""
        return list(self._tensors)

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a tensor, after renaming and interpolation."""
        return self.read(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of a tensor in the file."""
        return self._tensors[name].dtype

    def read(self, name: str, part: tuple[int, int, int, int] | None = None) -> Tensor:
        """Returns a tensor, or a part of the tensor. Values are read from disk when they are used.

        Args:
            name: name of the tensor in this project.
            part: (top, bottom, left, right) selects rows [top, bottom) and columns [left, right) of the tensor, viewed
                as a matrix (`matrix_part`). None returns the whole tensor.
        """
        tensor = self._tensors[name]
        if name == IMAGE_POSITION:
            tensor = interpolate_positions(tensor[None], self.model.grid_size)[0]
        return tensor if part is None else matrix_part(tensor, part)

    def release_pages(self) -> None:
        """Does nothing: the file's pages stay in memory."""


def exported_model(note: ExportNote) -> ModelConfig:
    """Returns the configuration of the model in a file that this program exported to unilm's format.

    The file contains no vision-language experts, so a pair needs the vision and the language experts. The model accepts
    a kind of input (images, texts or pairs) only if the file has the needed experts in every block.
    """
    letters = reference_branches(note.model, fusion=note.format == "unilm-fusion")
    needs = {"images": {"A"}, "texts": {"B"}, "pairs": {"A", "B"}}
    inputs = tuple(kind for kind in note.model.inputs if needs[kind] <= letters.keys())
    return dataclasses.replace(note.model, num_vision_language_layers=0, inputs=inputs)


def _by_logical_name(
    tensors: dict[str, Tensor], config: ModelConfig, where: str, *, has_extras: bool
) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    rest = dict(tensors)
    if LOG_SCALE_KEY in head_keys(tensors):
        named[EXTRA_PREFIX + LOG_SCALE_KEY] = tensors[LOG_SCALE_KEY]
    for key, name in (reference_keys(config) | head_keys(tensors)).items():
        if key not in rest:
            continue
        tensor = rest.pop(key)
        if key in POSITION_TABLES:
            if has_extras:
                named[EXTRA_PREFIX + key] = tensor[:UNUSED_POSITIONS]
            tensor = tensor[UNUSED_POSITIONS:]
            if not has_extras and name == TEXT_POSITION:
                tensor = tensor[: config.max_text_length]  # the export added zero rows at the end
        if key == LOG_SCALE_KEY:
            tensor = import_log_scale(tensor)
        tensor = tensor.flatten() if key in TOKENS else tensor
        if name in named and not torch.equal(named[name], tensor):
            raise ConfigError(
                f"{where}: {key} must equal other tensors of the file, which are one tensor ({name}) in the exported "
                "model. The file was changed after its export. Export the model again."
            )
        named[name] = tensor
    if unknown := [key for key in rest if key.startswith("beit3.")]:
        raise ConfigError(
            f"{where}: {len(unknown)} tensors of the backbone are not in the released format, such as {unknown[0]}. "
            f"Without them, the model would compute something else. Use a released file."
        )
    return named | {EXTRA_PREFIX + key: tensor for key, tensor in rest.items()}


def _parameter_shapes(config: ModelConfig, build_head: HeadBuilder) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in TaskModel(build_head, config).named_parameters()}
