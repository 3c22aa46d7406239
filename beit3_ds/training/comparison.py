"""Compares the loss curves of two runs, for example of one configuration under two layouts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit3_ds.config import ConfigError
from beit3_ds.picture import new_figure, save_figure
from beit3_ds.training.metrics_log import MetricsLog
from beit3_ds.training.progress import OTHER_FIGURES


@dataclass(frozen=True)
class Comparison:
    """Holds the training losses of two runs at the steps that both runs recorded."""

    names: tuple[str, str]
    """Output folders of the two runs."""
    steps: tuple[int, ...]
    """Number of steps done at each compared record, ascending."""
    losses: dict[str, tuple[tuple[float, ...], tuple[float, ...]]]
    """Losses by name: those of the first run and those of the second run, at `steps`. The names are "loss" and the
    terms that both runs recorded."""

    def largest_difference(self, name: str) -> tuple[float, int]:
        """Returns the largest absolute difference of a loss between the two runs, and its step."""
        first, second = self.losses[name]
        return max((abs(a - b), step) for a, b, step in zip(first, second, self.steps, strict=True))

    def describe(self) -> str:
        """Returns the number of common steps and, in one line per loss, the largest difference and the step at which it
        occurs.
        """
        lines = [f"{self.names[0]} and {self.names[1]}: {len(self.steps)} steps in common"]
        for name in self.losses:
            difference, step = self.largest_difference(name)
            lines.append(f"  {name:<10} largest difference {difference:.2e} nats, at step {step}")
        return "\n".join(lines)


def compare_runs(first: Path, second: Path) -> Comparison:
    """Reads the recorded losses of two runs, and pairs them by step.

    Args:
        first: output folder of one run (`training.output_dir`).
        second: output folder of the other run.

    Raises:
        ConfigError: if a folder has no records, or the runs recorded no common step.
    """
    rows = [_train_records(folder) for folder in (first, second)]
    steps = sorted(rows[0].keys() & rows[1].keys())
    if not steps:
        raise ConfigError(
            f"{first} and {second} recorded no step in common. Train both with the same training.log_interval."
        )
    everywhere = set[str].intersection(*(set(row[step]) for row in rows for step in steps))
    figures = [name for name, value in rows[0][steps[0]].items() if isinstance(value, float) and name in everywhere]
    names = [name for name in figures if name not in OTHER_FIGURES]
    if "loss" not in names:
        raise ConfigError(f"{first} and {second} have common steps without a 'loss'. Compare complete records.")
    losses = {name: tuple(tuple(row[step][name] for step in steps) for row in rows) for name in names}
    return Comparison((str(first), str(second)), tuple(steps), losses)  # type: ignore[arg-type]


def _train_records(folder: Path) -> dict[int, dict[str, Any]]:
    records = MetricsLog(folder / "metrics.jsonl").figures()
    if not records:
        raise ConfigError(f"{folder}: holds no metrics.jsonl of a run (training.output_dir).")
    return {record["step"]: record for record in records if record["kind"] == "train"}


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Draws two plots over the steps. The upper plot shows the total loss of each run. The lower plot shows, for every
    loss, the absolute difference between the runs.

    Args:
        comparison: losses of the two runs.
        path: path of the PNG file to write.
    """
    figure, (top, bottom) = new_figure(2, 1, (9, 7))
    for name, values, style in zip(comparison.names, comparison.losses["loss"], ("-", "--"), strict=True):
        top.plot(comparison.steps, values, style, label=name)
    top.set_ylabel("loss (nats, sum of the terms)")
    top.legend()
    for name, (first, second) in comparison.losses.items():
        difference = [max(abs(a - b), 1e-9) for a, b in zip(first, second, strict=True)]
        bottom.semilogy(comparison.steps, difference, label=name, linewidth=1)
    bottom.set_ylabel("absolute difference (nats)")
    bottom.set_xlabel("step")
    bottom.legend(ncols=5, fontsize="small")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    save_figure(figure, path)
