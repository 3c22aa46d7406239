"""Defines the entries of the tables of DeepSpeed keys (`deepspeed_keys`); each entry checks the value of one key."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit3_ds.config.numbers import Range
from beit3_ds.config.strict import ConfigError, check_known_keys, is_plain_text, show

ALL_STAGES = (0, 1, 2, 3)
"""Every stage of ZeRO."""

_LONGEST_NAME = 255
"""Maximum bytes that file systems allow in one name."""


@dataclass(frozen=True, kw_only=True)
class Spec(ABC):
    """Describes the valid values of an accepted key."""

    effect: str
    """Description of the key's effect, for the documentation."""
    stages: tuple[int, ...] = ALL_STAGES
    """ZeRO stages in which the key has an effect; in other stages `beit3 check` reports that it has none."""
    samples: tuple[Any, ...] = ()
    """Values of the key that tests train with."""

    @abstractmethod
    def read(self, value: Any, where: str) -> Any:
        """Checks a value, and returns it in the form that DeepSpeed expects.

        Raises:
            ConfigError: if the value is invalid; the message names key, value, rule and a valid value.
        """

    @property
    @abstractmethod
    def rule(self) -> str:
        """Returns a description of the valid values that completes the sentence "expected ..."."""

    def _refuse(self, value: Any, where: str) -> ConfigError:
        if value == "auto":
            return ConfigError(
                f'{where}: "auto" is filled in by Hugging Face\'s Trainer; here nothing does. Write {self.rule}, or '
                "leave the key out."
            )
        return ConfigError(f"{where}: expected {self.rule}, got {show(value)}.")


@dataclass(frozen=True, kw_only=True)
class Flag(Spec):
    """Describes a key that is true or false."""

    samples: tuple[Any, ...] = (True, False)

    def read(self, value: Any, where: str) -> bool:
        """Checks that the value is true or false, and returns it."""
        if not isinstance(value, bool):
            raise self._refuse(value, where)
        return value

    @property
    def rule(self) -> str:
        """Returns "true or false", for messages that begin with "expected"."""
        return "true or false"


@dataclass(frozen=True, kw_only=True)
class Fixed(Spec):
    """Describes a key with a single accepted value."""

    value: Any
    reason: str
    """Reason why other values are refused: their consequence, or an alternative."""
    effect: str = ""

    def read(self, value: Any, where: str) -> Any:
        """Checks that the value is the accepted one, and returns it."""
        if isinstance(value, bool) != isinstance(self.value, bool) or value != self.value:
            raise ConfigError(f"{where}: {show(value)} is not supported, only {self.rule}, because {self.reason}")
        return value

    @property
    def rule(self) -> str:
        """Returns the accepted value as JSON, for messages."""
        return json.dumps(self.value)


@dataclass(frozen=True, kw_only=True)
class Number(Spec):
    """Describes a key whose value is a number in a range; an integer may be written as 5e8, as in DeepSpeed."""

    range: Range
    whole: bool = True
    """Whether the number must be an integer."""
    multiple_of: int = 1

    def read(self, value: Any, where: str) -> int | float:
        """Checks the value and returns it, as an int if it must be whole, otherwise as a float."""
        if isinstance(value, bool) or not isinstance(value, int | float) or value not in self.range:
            raise self._refuse(value, where)
        if not self.whole:
            return float(value)
        if value != int(value) or int(value) % self.multiple_of:
            raise self._refuse(value, where)
        return int(value)

    @property
    def rule(self) -> str:
        """Returns the valid numbers in words, such as "an integer between 1 and 8", for messages."""
        kind = "an integer" if self.whole else "a number"
        multiple = f", a multiple of {self.multiple_of}" if self.multiple_of > 1 else ""
        return f"{kind} {self.range}{multiple}"


@dataclass(frozen=True, kw_only=True)
class Choice(Spec):
    """Describes a key with a few accepted values."""

    values: tuple[str | int, ...]
    reason: str = ""
    """Reason why a value that DeepSpeed knows is not accepted."""

    def read(self, value: Any, where: str) -> str | int:
        """Checks that the value is one of the accepted ones, and returns it."""
        if isinstance(value, bool) or not isinstance(value, str | int) or value not in self.values:
            raise self._refuse(value, where)
        return value

    @property
    def rule(self) -> str:
        """Returns the accepted values in words, such as '"fp32" or "bf16"', for messages."""
        *first, last = map(json.dumps, self.values)
        values = f"{', '.join(first)} or {last}" if first else last
        return f"{values} ({self.reason})" if self.reason else values


@dataclass(frozen=True, kw_only=True)
class Text(Spec):
    """Describes a key whose value is a printable text, not empty; parts between slashes have at most 255 bytes.

    A text with `is_folder_name` names one folder and has no slashes.
    """

    is_folder_name: bool = False
    is_inner_path: bool = False
    """Whether the text must be a relative path below another folder: without `..`, and without `~` in front."""

    def read(self, value: Any, where: str) -> str:
        """Checks that the value is a valid text, and returns it."""
        if not isinstance(value, str) or not value or value == "auto" or not is_plain_text(value):
            raise self._refuse(value, where)
        if max(len(part.encode()) for part in value.split(os.sep)) > _LONGEST_NAME:
            raise self._refuse(value, where)
        if self.is_folder_name and (os.sep in value or value in (".", "..")):
            raise self._refuse(value, where)
        if self.is_inner_path and (value[0] in "/~" or ".." in Path(value).parts):
            raise self._refuse(value, where)
        return value

    @property
    def rule(self) -> str:
        """Returns the valid texts in words, such as "the name of one folder", for messages."""
        return (
            "the name of one folder"
            if self.is_folder_name
            else "a folder inside training.output_dir"
            if self.is_inner_path
            else "a name"
        )


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Describes a key of DeepSpeed that this project refuses."""

    reason: str
    """Reason why the key is refused, and an alternative."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Describes a JSON object with its own keys."""

    keys: Mapping[str, "Spec | Refused | Section"]
    example: str
    """Example of a valid object, for error messages."""

    def read(self, value: Any, where: str) -> dict[str, Any]:
        """Checks a JSON object and the values of its keys, and returns it in the form that DeepSpeed expects."""
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a JSON object such as {self.example}, got {show(value)}.")
        check_known_keys(value, self.keys, where)
        return {key: read_key(self.keys[key], item, f"{where}.{key}") for key, item in value.items()}


def read_key(spec: Spec | Refused | Section, value: Any, where: str) -> Any:
    """Checks the value of one key, and returns it in the form that DeepSpeed expects.

    Raises:
        ConfigError: if the value is invalid or the key is refused.
    """
    if isinstance(spec, Refused):
        raise ConfigError(f"{where} is not supported: {spec.reason}")
    return spec.read(value, where)
