"""What a value of one DeepSpeed key may be; `deepspeed_keys` builds its table from these."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit3_ds.config.numbers import Range
from beit3_ds.config.strict import ConfigError, check_known_keys, is_plain_text, show

ALL_STAGES = (0, 1, 2, 3)
"""Every stage of ZeRO."""

_LONGEST_NAME = 255
"""Bytes that file systems allow in one name."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One accepted key."""

    effect: str
    """What it changes, for the documentation."""
    stages: tuple[int, ...] = ALL_STAGES
    """The ZeRO stages in which it has an effect. In others it may be given, and `beit3 check` says so."""
    samples: tuple[Any, ...] = ()
    """Values that tests run with, each beside otherwise shipped settings."""

    def read(self, value: Any, where: str) -> Any:
        """The value as DeepSpeed is to get it.

        Raises:
            ConfigError: naming key, value, rule and what to write instead.
        """
        raise NotImplementedError

    @property
    def rule(self) -> str:
        """The values that are accepted, as words that follow "expected"."""
        raise NotImplementedError

    def _refuse(self, value: Any, where: str) -> ConfigError:
        if value == "auto":
            return ConfigError(
                f'{where}: "auto" is filled in by Hugging Face\'s Trainer; here nothing does. Write {self.rule}, or '
                "leave the key out."
            )
        return ConfigError(f"{where}: expected {self.rule}, got {show(value)}.")


@dataclass(frozen=True, kw_only=True)
class Flag(Spec):
    """true or false."""

    samples: tuple[Any, ...] = (True, False)

    def read(self, value: Any, where: str) -> bool:
        """See `Spec`."""
        if not isinstance(value, bool):
            raise self._refuse(value, where)
        return value

    @property
    def rule(self) -> str:
        """See `Spec`."""
        return "true or false"


@dataclass(frozen=True, kw_only=True)
class Fixed(Spec):
    """A key whose one value may be written; every other one is refused, with the reason."""

    value: Any
    reason: str
    """Why no other value: what would go wrong, or what to use instead."""
    effect: str = ""

    def read(self, value: Any, where: str) -> Any:
        """See `Spec`."""
        if isinstance(value, bool) != isinstance(self.value, bool) or value != self.value:
            raise ConfigError(f"{where}: {show(value)} is not supported, only {self.rule}, because {self.reason}")
        return value

    @property
    def rule(self) -> str:
        """See `Spec`."""
        return json.dumps(self.value)


@dataclass(frozen=True, kw_only=True)
class Number(Spec):
    """A number of a range; an integer may be written as 5e8, as DeepSpeed's documentation does."""

    range: Range
    whole: bool = True
    """Whether it is an integer."""
    multiple_of: int = 1

    def read(self, value: Any, where: str) -> int | float:
        """See `Spec`."""
        if isinstance(value, bool) or not isinstance(value, int | float) or value not in self.range:
            raise self._refuse(value, where)
        if not self.whole:
            return float(value)
        if value != int(value) or int(value) % self.multiple_of:
            raise self._refuse(value, where)
        return int(value)

    @property
    def rule(self) -> str:
        """See `Spec`."""
        kind = "an integer" if self.whole else "a number"
        multiple = f", a multiple of {self.multiple_of}" if self.multiple_of > 1 else ""
        return f"{kind} {self.range}{multiple}"


@dataclass(frozen=True, kw_only=True)
class Choice(Spec):
    """One of a few values."""

    values: tuple[str | int, ...]
    reason: str = ""
    """Why a value that DeepSpeed knows is not among them."""

    def read(self, value: Any, where: str) -> str | int:
        """See `Spec`."""
        if isinstance(value, bool) or not isinstance(value, str | int) or value not in self.values:
            raise self._refuse(value, where)
        return value

    @property
    def rule(self) -> str:
        """See `Spec`."""
        *first, last = map(json.dumps, self.values)
        values = f"{', '.join(first)} or {last}" if first else last
        return f"{values} ({self.reason})" if self.reason else values


@dataclass(frozen=True, kw_only=True)
class Text(Spec):
    """A name: not empty, printable, no longer than a file's name, and without a slash if it names one folder."""

    is_folder_name: bool = False
    is_inner_path: bool = False
    """Whether it names a folder inside another: neither absolute nor with `..` or `~`."""

    def read(self, value: Any, where: str) -> str:
        """See `Spec`."""
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
        """See `Spec`."""
        return (
            "the name of one folder"
            if self.is_folder_name
            else "a folder inside training.output_dir"
            if self.is_inner_path
            else "a name"
        )


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A key that DeepSpeed knows and this project does not take."""

    reason: str
    """Why, and what to use instead."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A JSON object with keys of its own."""

    keys: Mapping[str, "Spec | Refused | Section"]
    example: str
    """What a user may have meant who wrote something else."""

    def read(self, value: Any, where: str) -> dict[str, Any]:
        """See `Spec`."""
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a JSON object such as {self.example}, got {show(value)}.")
        check_known_keys(value, self.keys, where)
        return {key: read_key(self.keys[key], item, f"{where}.{key}") for key, item in value.items()}


def read_key(spec: Spec | Refused | Section, value: Any, where: str) -> Any:
    """The value of one key as DeepSpeed is to get it.

    Raises:
        ConfigError: as `Spec.read`, or for a key that is not taken at all.
    """
    if isinstance(spec, Refused):
        raise ConfigError(f"{where} is not supported: {spec.reason}")
    return spec.read(value, where)
