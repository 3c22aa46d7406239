"""Defines the section "task" of a run's file, which names the task and contains its settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from beit3_ds.config.strict import ConfigError, load_section, show

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Holds the name and the settings of the task that a run trains."""

    name: str = "pretraining"
    """Name of a folder in `beit3_ds/tasks`, or the dotted name of a module that defines a task."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the section other than `name`, which the task checks and reads (`load`)."""

    def load(self, cls: type[T]) -> T:
        """Builds the task's own dataclass from the section's keys other than `name`.

        Raises:
            ConfigError: if a key is unknown or missing, or a value is invalid.
        """
        return load_section(cls, dict(self.settings), "beit3_ds.task")


def load_task_section(mapping: Any, where: str) -> TaskConfig:
    """Reads the section "task"; the task itself checks its settings later (`TaskConfig.load`).

    Raises:
        ConfigError: if the section is not an object or its name is not a string.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: expected a JSON object, got {show(mapping)}.")
    settings = dict(mapping)
    name = settings.pop("name", TaskConfig.name)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}.name: expected the name of a task, such as {TaskConfig.name!r}, got {show(name)}.")
    return TaskConfig(name=name, settings=settings)
