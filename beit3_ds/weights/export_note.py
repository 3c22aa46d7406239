"""Defines the note that this program adds to files exported in other projects' formats.

The note contains the model's configuration, which these formats lack and which an import needs.
"""

import dataclasses
import json
from typing import Any, NamedTuple

from beit3_ds.config import ConfigError, ModelConfig
from beit3_ds.config.strict import load_section
from beit3_ds.model.pretrained import parse_task
from beit3_ds.untrusted_json import check_count, check_object, parse_untrusted_json

NOTE_KEY = "beit3_ds_export"
"""Key of the note. A torch file stores the note next to the state dict, and a safetensors file stores it in the
metadata."""


class ExportNote(NamedTuple):
    """Describes the model, format and task of one exported file."""

    format: str
    """Format of the file: `unilm-dual`, `unilm-fusion` or `timm`."""
    model: ModelConfig
    """Configuration of the exported model. It includes the model's vision-language experts even if the file lacks them.
    """
    step: int
    """Number of training steps before the weights were saved; 0 if unknown."""
    has_extras: bool
    """Whether the file contains tensors that this project does not use, such as unused rows of position tables."""
    task: dict[str, Any] | None = None
    """Name and settings of the head's task; None in files from older versions."""

    def to_json(self) -> str:
        """Returns the note as JSON text."""
        return json.dumps(self._asdict() | {"model": dataclasses.asdict(self.model)})


def parse_note(text: str, where: str) -> ExportNote:
    """Parses the JSON text of a note.

    Args:
        text: JSON text of the note.
        where: name of the file, for messages.

    Raises:
        ConfigError: if the text is invalid, or the model has settings that this version of the program lacks.
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
