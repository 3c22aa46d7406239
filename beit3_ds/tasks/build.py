"""Imports and builds the task named by a run's configuration."""

import importlib
import importlib.util
import pkgutil

import beit3_ds.tasks
from beit3_ds.config import ConfigError, RunConfig
from beit3_ds.tasks.task import Task


def build_task(config: RunConfig) -> Task:
    """Imports and builds the task named by `task.name`.

    Raises:
        ConfigError: if no module with this name defines a task, or if the task does not accept the configuration.
    """
    name = config.task.name
    module = name if "." in name else f"beit3_ds.tasks.{name}"
    try:
        task = importlib.import_module(module).TASK
    except (ImportError, AttributeError) as error:
        known = [folder.name for folder in pkgutil.iter_modules(beit3_ds.tasks.__path__) if folder.ispkg]
        raise ConfigError(
            f"task.name={name!r}: the module {module} has no task ({error}). Name one of "
            f"{', '.join(sorted(known))}, or a module that has a class TASK (beit3_ds/tasks/task.py)."
        ) from None
    built: Task = task(config)
    return built
