"""Records the best evaluation of a run, for early stopping and to decide which checkpoint to keep."""

import math
from collections.abc import Mapping
from typing import Any

from beit3_ds.checkpoint.index import BEST
from beit3_ds.config import ConfigError, TrainingConfig
from beit3_ds.tasks import Task


class BestCheckpoint:
    """Records the best evaluation so far, across restarts of the run.

    Attributes:
        metric: name of the compared metric; None disables the comparison.
        step: number of steps done at the best evaluation; None before the first evaluation.
        value: value of the metric at `step`.
    """

    def __init__(self, config: TrainingConfig, *, is_higher_better: bool, data: Mapping[str, Any]) -> None:
        """Restores the best evaluation from a resumed checkpoint, if it has one.

        Args:
            config: section "training", which has `best_metric` and `early_stop_evaluations`.
            is_higher_better: whether larger values of the metric are better.
            data: `Index.data` of the resumed checkpoint. An entry for another metric is ignored.
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
        """Returns whether an evaluation is better than the best one so far, and if so, records it.

        The first evaluation whose value is not NaN counts as better. If `training.best_metric` is None, nothing is
        recorded and the result is False.

        Args:
            step: number of steps done.
            record: means and metrics of the evaluation by name, equal on all ranks.

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
        """Returns whether the last `training.early_stop_evaluations` evaluations brought no improvement."""
        return self._patience is not None and self._evaluations_since >= self._patience

    @property
    def may_be_exhausted_next(self) -> bool:
        """Returns whether the run stops early if the next evaluation does not improve the metric."""
        return self._patience is not None and self._evaluations_since + 1 >= self._patience

    def state(self) -> dict[str, Any]:
        """Returns the entry for `Index.data` that records the best evaluation; empty before the first evaluation."""
        if self.step is None:
            return {}
        fields = {"metric": self.metric, "step": self.step, "value": self.value}
        return {BEST: fields | {"evaluations_since": self._evaluations_since}}

    def describe(self) -> str:
        """Returns the metric, its best value and the step as short text."""
        return f"{self.metric} {self.value:.4f} after step {self.step}"


def is_higher_better(task: Task) -> bool:
    """Returns whether larger values of `training.best_metric` are better; False if it is not set.

    Raises:
        ConfigError: if the task has no such metric, or the run has no validation data.
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
