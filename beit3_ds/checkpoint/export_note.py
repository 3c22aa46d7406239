"""What a file in another project's layout says of the model that it was exported from.

Other projects' layouts have no place for it, and shapes do not tell everything (attention heads, what A and B share).
Without it this program could not read back what it wrote. Their own readers pass over it.
"""

import dataclasses
import json
from typing import NamedTuple

from beit3_ds.config import ConfigError, ModelConfig
from beit3_ds.config.strict import load_section

NOTE_KEY = "beit3_ds_export"
"""Where it is: beside the state dict in torch's files, in the metadata of safetensors files."""


class ExportNote(NamedTuple):
    """The note of one file."""

    format: str
    """unilm-dual, unilm-fusion or timm."""
    model: ModelConfig
    """The model that was exported, vision-language experts included."""
    step: int
    """Updates that made the weights; 0 if unknown."""
    has_extras: bool
    """Whether the file holds tensors that this project has no place for, unused rows of position tables among them."""

    def to_json(self) -> str:
        """The note as text."""
        return json.dumps(self._asdict() | {"model": dataclasses.asdict(self.model)})


def parse_note(text: str, where: str) -> ExportNote:
    """Reads a note.

    Raises:
        ConfigError: if it cannot be read, or is of a version of this program with other settings.
    """
    try:
        fields = json.loads(text)
        return ExportNote(
            format=str(fields["format"]),
            model=load_section(ModelConfig, fields["model"], f"{where}: model"),
            step=int(fields["step"]),
            has_extras=bool(fields["has_extras"]),
        )
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: what it says of its export cannot be read ({error!r}). Export it again.") from None
