"""Defines classes that describe one DeepSpeed key each, and check the value of the key.

The tables in `deepspeed_keys.py` and `zero_keys.py` contain an object of these classes for each accepted key.
"""

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
"""All ZeRO stages."""

_LONGEST_NAME = 255
"""Maximum length of a file name in bytes."""


@dataclass(frozen=True, kw_only=True)
class Spec(ABC):
    """Describes an accepted DeepSpeed key: its valid values and its effect."""

    effect: str
    """Description of the key's effect, used in the documentation."""
    stages: tuple[int, ...] = ALL_STAGES
    """ZeRO stages in which the key has an effect. In other stages, `beit3 check` reports the key as unused."""
    samples: tuple[Any, ...] = ()
    """Values of this key for tests. The tests train a model with each value."""

    @abstractmethod
    def read(self, value: Any, where: str) -> Any:
        """Checks a value, and returns it in the form that DeepSpeed expects.

        Args:
            value: JSON value of the key.
            where: dotted name of the key, for messages.

        Raises:
            ConfigError: if the value is invalid; the message describes the valid values.
        """

    @property
    @abstractmethod
    def rule(self) -> str:
        """Returns a description of the valid values, which error messages put after "expected"."""

    def _refuse(self, value: Any, where: str) -> ConfigError:
        if value == "auto":
            return ConfigError(
                f'{where}: "auto" is filled in by Hugging Face\'s Trainer; here nothing does. Write {self.rule}, or '
                "leave the key out."
            )
        return ConfigError(f"{where}: expected {self.rule}, got {show(value)}.")


@dataclass(frozen=True, kw_only=True)
class Flag(Spec):
    """Describes a key whose value is true or false."""

    samples: tuple[Any, ...] = (True, False)

    def read(self, value: Any, where: str) -> bool:
        """Checks that the value is a bool, and returns it."""
        if not isinstance(value, bool):
            raise self._refuse(value, where)
        return value

    @property
    def rule(self) -> str:
        """Returns the valid values in words: "true or false"."""
        return "true or false"


@dataclass(frozen=True, kw_only=True)
class Fixed(Spec):
    """Describes a key that accepts only one value."""

    value: Any
    reason: str
    """Reason for refusing other values, used in error messages."""
    effect: str = ""

    def read(self, value: Any, where: str) -> Any:
        """Checks that the value is the accepted value, and returns it."""
        if isinstance(value, bool) != isinstance(self.value, bool) or value != self.value:
            raise ConfigError(f"{where}: {show(value)} is not supported, only {self.rule}, because {self.reason}")
        return value

    @property
    def rule(self) -> str:
        """Returns the only accepted value as JSON."""
        return json.dumps(self.value)


@dataclass(frozen=True, kw_only=True)
class Number(Spec):
    """Describes a key whose value is a number in a range. Integers may be written as 5e8, as in DeepSpeed."""

    range: Range
    whole: bool = True
    """Whether the value must be an integer."""
    multiple_of: int = 1

    def read(self, value: Any, where: str) -> int | float:
        """Checks the value, and returns it as an int (`whole`) or as a float."""
        if isinstance(value, bool) or not isinstance(value, int | float) or value not in self.range:
            raise self._refuse(value, where)
        if not self.whole:
            return float(value)
        if value != int(value) or int(value) % self.multiple_of:
            raise self._refuse(value, where)
        return int(value)

    @property
    def rule(self) -> str:
        """Returns the valid numbers in words, such as "an integer between 1 and 8"."""
        kind = "an integer" if self.whole else "a number"
        multiple = f", a multiple of {self.multiple_of}" if self.multiple_of > 1 else ""
        return f"{kind} {self.range}{multiple}"


@dataclass(frozen=True, kw_only=True)
class Choice(Spec):
    """Describes a key that accepts a few listed values."""

    values: tuple[str | int, ...]
    reason: str = ""
    """Reason for refusing a value that DeepSpeed itself accepts; empty if no reason is given."""

    def read(self, value: Any, where: str) -> str | int:
        """Checks that the value is one of the accepted values, and returns it."""
        if isinstance(value, bool) or not isinstance(value, str | int) or value not in self.values:
            raise self._refuse(value, where)
        return value

    @property
    def rule(self) -> str:
        """Returns the accepted values in words, such as '"fp32" or "bf16"'."""
        *first, last = map(json.dumps, self.values)
        values = f"{', '.join(first)} or {last}" if first else last
        return f"{values} ({self.reason})" if self.reason else values


@dataclass(frozen=True, kw_only=True)
class Text(Spec):
    """Describes a key whose value is a non-empty printable string, such as a name or a relative path."""

    is_folder_name: bool = False
    is_inner_path: bool = False
    """Whether the string must be a path inside another folder, without `..` and without `/` or `~` at the beginning."""

    def read(self, value: Any, where: str) -> str:
        """Checks that the value is a valid string, and returns it."""
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
        """Returns the valid strings in words, such as "the name of one folder"."""
        return (
            "the name of one folder"
            if self.is_folder_name
            else "a folder inside training.output_dir"
            if self.is_inner_path
            else "a name"
        )


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Describes a DeepSpeed key that this project does not accept."""

    reason: str
    """Reason for refusing the key, with an alternative."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Describes a key whose value is a JSON object with known keys."""

    keys: Mapping[str, "Spec | Refused | Section"]
    example: str
    """Example of a valid JSON object, used in error messages."""

    def read(self, value: Any, where: str) -> dict[str, Any]:
        """Checks a JSON object and its keys, and returns the object in the form that DeepSpeed expects."""
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a JSON object such as {self.example}, got {show(value)}.")
        check_known_keys(value, self.keys, where)
        return {key: read_key(self.keys[key], item, f"{where}.{key}") for key, item in value.items()}


def read_key(spec: Spec | Refused | Section, value: Any, where: str) -> Any:
    """Checks the value of one DeepSpeed key, and returns it in the form that DeepSpeed expects.

    Args:
        spec: table entry of the key.
        value: JSON value of the key.
        where: dotted name of the key, for messages.

    Raises:
        ConfigError: if the value is invalid or the key is refused.
    """
    if isinstance(spec, Refused):
        raise ConfigError(f"{where} is not supported: {spec.reason}")
    return spec.read(value, where)
