"""Tests that a stop signal ends an evaluation or the report between two batches, and the next start repeats it."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.ranks import run_ranks


def train_with_stops(config: str, stops: list[tuple[str, int]]) -> list[int]:
    """Trains several times on one rank; each start receives SIGTERM in the n-th call of a function."""
    from beit3_ds.train import main
    from beit3_ds.training import evaluation, loop, report

    def stop_in(module: Any, name: str, number: int) -> Callable[[], None]:
        original, calls = getattr(module, name), []

        def stopped(*arguments: Any) -> Any:
            calls.append(name)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments)

        setattr(module, name, stopped)
        return lambda: setattr(module, name, original)

    statuses = []
    for name, number in stops:
        undo = stop_in(report if name == "write_report" else loop, name, number)
        statuses.append(main([config]))
        undo()
    assert loop.evaluate is evaluation.evaluate
    return [*statuses, main([config])]


def write(mapping: dict[str, Any], folder: Path) -> str:
    folder.mkdir()
    mapping["beit3_ds"]["training"]["output_dir"] = str(folder / "run")
    (folder / "config.json").write_text(json.dumps(mapping))
    return str(folder / "config.json")


def validation_records(folder: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == "validation"]


def best_of(folder: Path) -> dict[str, Any]:
    index = json.loads((folder / "run" / "checkpoints" / "step-00000004" / "index.json").read_text())
    assert "evaluation_due" not in index["data"]
    return index["data"]["best"]


def test_what_a_stop_cancels_is_done_again(run_mapping: dict[str, Any], tmp_path: Path, capfd: Any) -> None:
    """Catches an evaluation that no start completes, a run without a report, and a step that is evaluated twice."""
    run_mapping["zero_optimization"]["stage"] = 0
    run_mapping["beit3_ds"]["training"] |= {"save_interval": 100, "best_metric": "pair_mlm", "eval_interval": 2}
    stopped, undisturbed = tmp_path / "stopped", tmp_path / "undisturbed"
    # The first evaluation; that of step 2, twice; the last one; and the report.
    stops = [("evaluate", 1), ("evaluate", 2), ("evaluate", 1), ("evaluate", 2), ("write_report", 1)]
    config = write(run_mapping, stopped)
    assert run_ranks(train_with_stops, 1, config, stops) == [[0] * 6]
    printed = capfd.readouterr().out
    assert printed.count("stopped after step 2 on SIGTERM, before it was evaluated; the same command resumes") == 2
    assert "stopped after step 4 on SIGTERM, before it was evaluated" in printed
    assert printed.count("stopped on SIGTERM before the report was written; the same command writes it") == 1
    assert printed.count("Finished 4 steps") == 1 and (stopped / "run" / "summary.json").exists()
    assert run_ranks(train_with_stops, 1, write(run_mapping, undisturbed), []) == [[0]]
    assert validation_records(stopped) == validation_records(undisturbed)
    assert best_of(stopped) == best_of(undisturbed)
