"""Defines the note that this program adds to files it exports in other projects' formats.

The note holds the model's configuration, which these formats lack. This program needs the note to import its own files.
"""

import dataclasses
import json
from typing import Any, NamedTuple

from beit3_ds.config import ConfigError, ModelConfig
from beit3_ds.config.strict import load_section
from beit3_ds.model.pretrained import parse_task
from beit3_ds.untrusted_json import check_count, check_object, parse_untrusted_json

NOTE_KEY = "beit3_ds_export"
"""Key of the note in the dictionary of a torch file, next to the state dict, or in a safetensors file's metadata."""


class ExportNote(NamedTuple):
    """Describes the model, format and task of one exported file."""

    format: str
    """Format of the file: unilm-dual, unilm-fusion or timm."""
    model: ModelConfig
    """Configuration of the model before the export, including vision-language experts that the file may lack."""
    step: int
    """Number of updates that the weights have had; 0 if unknown."""
    has_extras: bool
    """Whether the file holds tensors that this project does not use, such as unused rows of position tables."""
    task: dict[str, Any] | None = None
    """Name and settings of the task to which the head belongs; None in files of older versions."""

    def to_json(self) -> str:
        """Returns the note as JSON text."""
        return json.dumps(self._asdict() | {"model": dataclasses.asdict(self.model)})


def parse_note(text: str, where: str) -> ExportNote:
    """Parses the text of a note.

    Raises:
        ConfigError: if the text is invalid, or if its model has settings that this version of the program lacks.
    """
    try:
        fields = check_object(parse_untrusted_json(text))
        return ExportNote(
            format=str(fields["format"]),
            model=load_section(ModelConfig, fields["model"], f"{where}: model"),
            step=check_count(fields["step"]),
            has_extras=bool(fields["has_extras"]),
            task=parse_task(fields.get("task")),
        )
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: the note about its export cannot be read ({error!r}). Export it again.") from None
