"""Finds the best evaluation of a run, to keep its checkpoint and to stop a run that no longer improves."""

import math
from collections.abc import Mapping
from typing import Any

from beit3_ds.checkpoint.index import BEST
from beit3_ds.config import ConfigError, TrainingConfig
from beit3_ds.tasks import Task


class BestCheckpoint:
    """Records the best evaluation so far, over all restarts of a run.

    Attributes:
        metric: name of the compared metric; None compares nothing.
        step: updates done at the best evaluation; None before the first.
        value: the metric at `step`.
    """

    def __init__(self, config: TrainingConfig, *, is_higher_better: bool, data: Mapping[str, Any]) -> None:
        """Starts from the best evaluation that a resumed checkpoint records, if any.

        Args:
            config: holds `best_metric` and `early_stop_evaluations`.
            is_higher_better: whether a larger value of the metric is better.
            data: data of the resumed checkpoint (`Index.data`); a record of another metric is ignored.
        """
        self.metric, self._is_higher_better = config.best_metric, is_higher_better
        self._patience = config.early_stop_evaluations
        state = data.get(BEST, {})
        if state.get("metric") != self.metric:
            state = {}
        self.step: int | None = state.get("step")
        self.value: float = state.get("value", math.nan)
        self._evaluations_since: int = state.get("evaluations_since", 0)

    def add(self, step: int, record: Mapping[str, Any]) -> bool:
        """Compares one evaluation with the best one; returns whether it is better.

        Args:
            step: updates done.
            record: the evaluation's means and metrics by name, the same on all ranks.

        Raises:
            ConfigError: if the evaluation lacks the metric `training.best_metric`.
        """
        if self.metric is None:
            return False
        if self.metric not in record:
            names = ", ".join(name for name, value in record.items() if isinstance(value, float))
            raise ConfigError(
                f"training.best_metric={self.metric!r}: the evaluation of step {step} has only {names or 'nothing'}. "
                "Name one of these, or give the stream of the metric a validation source."
            )
        value = float(record[self.metric])
        better = value > self.value if self._is_higher_better else value < self.value
        if better or (self.step is None and not math.isnan(value)):
            self.step, self.value, self._evaluations_since = step, value, 0
            return True
        self._evaluations_since += 1
        return False

    @property
    def is_exhausted(self) -> bool:
        """Returns whether `training.early_stop_evaluations` evaluations in a row brought no improvement."""
        return self._patience is not None and self._evaluations_since >= self._patience

    @property
    def may_be_exhausted_next(self) -> bool:
        """Returns whether the run will stop early unless the next evaluation is better than the best one."""
        return self._patience is not None and self._evaluations_since + 1 >= self._patience

    def state(self) -> dict[str, Any]:
        """Returns the best evaluation as an entry "best" of `Index.data`; {} before the first evaluation."""
        if self.step is None:
            return {}
        fields = {"metric": self.metric, "step": self.step, "value": self.value}
        return {BEST: fields | {"evaluations_since": self._evaluations_since}}

    def describe(self) -> str:
        """Returns the best evaluation in a few words."""
        return f"{self.metric} {self.value:.4f} after step {self.step}"


def direction_of(task: Task) -> bool:
    """Returns whether a larger value of `training.best_metric` is better; False if no metric is set.

    Raises:
        ConfigError: if the task has no such metric, or no stream has validation data.
    """
    name, data = task.config.training.best_metric, task.config.data
    if name is None:
        return False
    losses = [term.name for term in task.terms if term.weight]
    known = [*([task.headline.name] if task.headline else []), *losses]
    if name not in known:
        raise ConfigError(
            f"training.best_metric={name!r} is not a metric by which the task {task.config.task.name} compares "
            f"checkpoints. Name one of: {', '.join(known)}."
        )
    if not any(stream.validation for stream in data.streams().values()):
        raise ConfigError(
            f"training.best_metric={name!r} needs validation data. Name some in data.*.validation, or leave it out."
        )
    return task.headline is not None and name == task.headline.name and task.headline.is_higher_better
