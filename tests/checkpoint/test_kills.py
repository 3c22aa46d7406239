"""Tests runs whose ranks are killed at random moments.

Every start must find a whole checkpoint, and the final state must not depend on the kills.
"""

import copy
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.training_run import TrainingRun, check_same_state
from tests.test_train import losses

LAUNCHER_SECONDS = 0.3
"""Longest time that other ranks survive a killed rank; it stands for a launcher that ends them."""


@dataclass
class Figures:
    """Counts kills, and those among them that hit a save."""

    kills: int = 0
    in_saves: int = 0
    """Kills that left an unfinished save: temporary files or folders, or a partly deleted checkpoint."""
    before_first_save: int = 0
    starts: int = 0
    runs: int = 0
    """Runs completed from the first step to the last."""


def run_with_kills(run: TrainingRun, duration: float, max_kills: int, draw: random.Random, figures: Figures) -> None:
    """Restarts a run until it ends by itself, and kills its ranks at most `max_kills` times.

    Args:
        run: a run that saves every step.
        duration: rough number of seconds from the start of the ranks to the end of the run.
        max_kills: largest number of kills.
        draw: chooses the rank and the moment of each kill, at any time or during a save.
        figures: counts to be increased.
    """
    told = kills = 0
    while True:
        left = unfinished(run)
        with run.started():
            figures.starts += 1
            if kills < max_kills:
                kill_one(run, duration, draw)
            statuses = run.wait()
        if resumed := re.search(r"^resuming after step (\d+) ", run.output(), re.MULTILINE):
            assert int(resumed[1]) >= told, run.output()
        elif told:
            assert not re.search(r"^(step|validation)", run.output(), re.MULTILINE), "it started from the beginning"
        assert "is not whole" not in run.output(), "kill -9 tore a checkpoint that had its name"
        told = max(told, run.reported_step())
        if statuses == [0] * len(statuses):
            break
        kills += 1
        figures.before_first_save += not told
        figures.in_saves += bool(unfinished(run) - left)
    figures.kills += kills
    figures.runs += 1


def unfinished(run: TrainingRun) -> set[tuple[str, int]]:
    """Returns the files of unfinished saves with their modification times."""
    return {(path.name, path.stat().st_ctime_ns) for path in run.checkpoints.glob(".*")}


def kill_one(run: TrainingRun, duration: float, draw: random.Random) -> None:
    if draw.random() < 0.5:
        sleep_or_end(run, draw.uniform(0, duration))
    else:
        for _ in range(draw.randrange(4)):
            wait_for_save(run)
        time.sleep(draw.uniform(0, 0.03))  # a save takes about as long
    others = list(run.ranks)
    others.pop(draw.randrange(len(others))).kill()
    time.sleep(draw.uniform(0, LAUNCHER_SECONDS))
    for rank in others:
        rank.kill()


def wait_for_save(run: TrainingRun) -> None:
    """Waits until another save begins or a rank has ended."""
    for is_there in (False, True):
        while any(run.checkpoints.glob(".writing-*")) != is_there and all(rank.poll() is None for rank in run.ranks):
            time.sleep(0.001)


def sleep_or_end(run: TrainingRun, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and all(rank.poll() is None for rank in run.ranks):
        time.sleep(0.01)


def check_same_run(run: TrainingRun, undisturbed: TrainingRun, step: int) -> None:
    check_same_state(run.checkpoint(step), undisturbed.checkpoint(step))
    assert losses(run.output_dir) == losses(undisturbed.output_dir)
    if f"resuming after step {step} " in run.output():
        return  # killed between the last save and its pruning, and saved no more
    kept = {path.name for path in run.checkpoints.iterdir()}
    assert kept == {"latest", *(f"step-{number:08d}" for number in range(step - 2, step + 1))}, "litter is left"


def test_killed_run_ends_as_an_undisturbed_one(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    """Kills a run of one rank, which starts quickly; the slow test kills runs of several ranks."""
    settings = {"total_steps": 8, "save_interval": 1, "eval_interval": 1000}
    undisturbed = TrainingRun(run_mapping, tmp_path / "undisturbed", **settings)
    start = time.monotonic()
    assert undisturbed.finish() == [0]
    figures, duration = Figures(), time.monotonic() - start
    while not figures.kills:  # a run may end before the moment of its kill
        assert figures.runs < 5, "no kill found its run"
        run = TrainingRun(run_mapping, tmp_path / f"killed-{figures.runs}", **settings)
        run_with_kills(run, duration, 4, random.Random(figures.runs), figures)
        check_same_run(run, undisturbed, 8)
    print(figures)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "two ranks, ZeRO-3": (2, {}),
    "two ranks, ZeRO-1": (2, {"zero_optimization": {"stage": 1}}),
    "one rank, no ZeRO": (1, {"zero_optimization": {"stage": 0}}),
    "two stages": (2, {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 2}),
}


@pytest.mark.slow
def test_a_hundred_kills(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    """Kills a run a hundred times, and prints how many kills hit a save."""
    settings = {"total_steps": 12, "save_interval": 1, "eval_interval": 1000}
    undisturbed, durations = {}, {}
    for number, (layout, (num_ranks, changes)) in enumerate(LAYOUTS.items()):
        mapping = copy.deepcopy(run_mapping) | changes
        if layout == "two stages":
            mapping["beit3_ds"]["parallel"] = {"pipeline_parallel_size": 2}
        start = time.monotonic()
        undisturbed[layout] = TrainingRun(mapping, tmp_path / f"undisturbed-{number}", num_ranks, **settings)
        assert undisturbed[layout].finish() == [0] * num_ranks
        durations[layout] = time.monotonic() - start
    figures, draw = Figures(), random.Random(0)
    while figures.kills < 100:
        layout = list(LAYOUTS)[figures.runs % len(LAYOUTS)]
        num_ranks, changes = LAYOUTS[layout]
        mapping = copy.deepcopy(run_mapping) | changes
        if layout == "two stages":
            mapping["beit3_ds"]["parallel"] = {"pipeline_parallel_size": 2}
        run = TrainingRun(mapping, tmp_path / f"killed-{figures.runs}", num_ranks, **settings)
        run_with_kills(run, durations[layout], 100 - figures.kills, draw, figures)
        check_same_run(run, undisturbed[layout], 12)
        print(layout, figures, flush=True)
    assert figures.in_saves >= 10
