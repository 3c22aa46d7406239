"""Defines the section "task", which selects the run's task and contains the task's settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from beit3_ds.config.strict import ConfigError, load_section, show

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Holds the name and the settings of a run's task."""

    name: str = "pretraining"
    """Name of a folder in `beit3_ds/tasks`, or dotted name of a module that defines a task."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """All keys of the section except `name`. They are checked when the task calls `load`."""

    def load(self, cls: type[T]) -> T:
        """Builds the task's own settings dataclass from `settings`.

        Raises:
            ConfigError: if a key is unknown or missing, or a value is invalid.
        """
        return load_section(cls, dict(self.settings), "beit3_ds.task")


def load_task_section(mapping: Any, where: str) -> TaskConfig:
    """Loads the section "task", but leaves the check of the task's settings to `TaskConfig.load`.

    Args:
        mapping: JSON value of the section.
        where: dotted name of the section, for messages.

    Raises:
        ConfigError: if the section is not an object, or the value of its key `name` is not a string or is empty.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: expected a JSON object, got {show(mapping)}.")
    settings = dict(mapping)
    name = settings.pop("name", TaskConfig.name)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}.name: expected the name of a task, such as {TaskConfig.name!r}, got {show(name)}.")
    return TaskConfig(name=name, settings=settings)
