"""Tests that programs end soon after a signal at any moment, resume, and reach the result of undisturbed ones."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from beit3_ds.checkpoint.folder import CheckpointFolder
from beit3_ds.runtime.stop_signals import STOP_SIGNALS
from tests.checkpoint.training_run import check_same_state
from tests.cluster.launch.test_launch_hosts import BEIT3
from tests.cluster.launch.test_plain_launchers import ENVIRONMENT, needs
from tests.hosts import Host
from tests.preloaded import ModuleProcess, start_module
from tests.run_config import small_run_mapping, visual_tokenizer_mapping
from tests.signalled_program import MARK

pytestmark = pytest.mark.slow

END_SECONDS = 10.0
"""Longest time from a signal to the end of all processes, in seconds."""
_LIFE_SECONDS = 300
# Functions by which a place is named; the first that is on the stack counts.
_PHASES = {
    "report": "report.report",
    "evaluation": "loop._evaluate",
    "saving": "store.save store.finish background_save.wait",
    "step": "loop._train_step loop._prepare_step",
    "reading data": "step_feed.fetch step_feed.attempt",
    "waiting for peers": "rendezvous.meet process_group._join",
    "end": "mesh.close",
    "building the run": "train.build_run",
    "index and files": "train.open_inputs",
    "training the text tokenizer": "text.train_text_tokenizer",
    "export and import": "export.export_weights",
}


class Stop(NamedTuple):
    """Describes what a signal did to the processes of a start."""

    phase: str
    seconds: float
    statuses: list[int]
    output: str


class Program:
    """Starts the processes of a program repeatedly; each start has its own output."""

    def __init__(self, folder: Path, module: str, arguments: Sequence[str | Path], num_ranks: int = 1) -> None:
        self._folder, self._module, self._arguments, self._num_ranks = folder, module, arguments, num_ranks
        self._starts = 0

    def finish(self) -> tuple[float, str]:
        """Runs the program undisturbed; returns the seconds it took and its output."""
        begun = time.monotonic()
        processes = self._start()
        statuses = [process.wait(_LIFE_SECONDS) for process in processes]
        assert statuses == [0] * self._num_ranks, (statuses, self._output())
        return time.monotonic() - begun, self._output()

    def stop(self, after: float, number: signal.Signals) -> Stop:
        """Sends a signal to all processes `after` seconds after their start, and waits for their end."""
        processes = self._start()
        time.sleep(after)
        signalled = time.monotonic()
        for process in processes:
            process.send_signal(number)
        try:
            statuses = [process.wait(_LIFE_SECONDS) for process in processes]
        finally:
            for process in processes:
                process.kill()
        seconds, output = time.monotonic() - signalled, self._output()
        return Stop(_phase(output), seconds, statuses, output)

    def _start(self) -> list[ModuleProcess]:
        self._starts += 1
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes = []
        for rank in range(self._num_ranks):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self._num_ranks, "MASTER_PORT": port}
            environment = os.environ | {name: str(value) for name, value in names.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
            with self._log(rank).open("w") as log:
                arguments = [self._module, *self._arguments]
                processes.append(start_module("tests.signalled_program", arguments, env=environment, output=log))
        return processes

    def _log(self, rank: int) -> Path:
        return self._folder / f"start{self._starts}_rank{rank}.log"

    def _output(self) -> str:
        return "".join(self._log(rank).read_text() for rank in range(self._num_ranks))


def _phase(output: str) -> str:
    places = re.findall(f"^{MARK}(.*)$", output, re.MULTILINE)
    if not places:
        return "before or after the program"
    words = places[0].split()
    named = (phase for phase, functions in _PHASES.items() if set(functions.split()) & set(words))
    return next(named, "other places")


def stop_repeatedly(
    program: Program,
    life: float,
    rng: random.Random,
    count: int,
    is_finished: Callable[[], bool],
    forget: Callable[[], None],
) -> list[Stop]:
    """Starts a program `count` times and signals it each time; resets the program if it has finished."""
    stops = []
    for _ in range(count):
        if is_finished():
            forget()
        stop = program.stop(rng.uniform(0, life), rng.choice(STOP_SIGNALS))
        assert "Traceback" not in stop.output, stop.output
        stops.append(stop)
    return stops


def describe(name: str, stops: Sequence[Stop]) -> None:
    """Prints the figures of some stops, and checks that each ended in time."""
    phases = Counter(stop.phase for stop in stops)
    statuses = Counter(status for stop in stops for status in stop.statuses)
    longest = max(stops, key=lambda stop: stop.seconds)
    print(
        f"\n{name}: {len(stops)} signals, longest {longest.seconds:.1f} s ({longest.phase}); {dict(phases)}; {statuses}"
    )
    assert longest.seconds < END_SECONDS, longest


def run_mapping_of(folder: Path, files: dict[str, str]) -> dict[str, Any]:
    mapping = small_run_mapping(2, samples=(2, 2, 2))
    own = mapping["beit3_ds"]
    own["tokenizers"]["text"] |= {"path": files["text"], "vocab_size": 300}
    own["tokenizers"]["visual"]["path"] = files["visual"]
    own["training"] |= {"output_dir": str(folder / "run"), "total_steps": 12, "warmup_steps": 1, "log_interval": 1}
    own["training"] |= {"eval_interval": 3, "eval_samples": 60, "save_interval": 4, "keep_checkpoints": 3}
    own["training"] |= {"best_metric": "pair_mlm"}
    return mapping


def validation_records(folder: Path) -> dict[int, dict[str, float]]:
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in records if record["kind"] == "validation"}


def check_same_run(ours: Path, expected: Path, step: int) -> None:
    """Checks weights, moments, the best evaluation and all validation records."""
    paths = [folder / "run" / "checkpoints" / f"step-{step:08d}" for folder in (ours, expected)]
    stopped, undisturbed = map(CheckpointFolder, paths)
    names = set(undisturbed.index.buffers)
    assert all(torch.equal(stopped.read_buffer(name), undisturbed.read_buffer(name)) for name in names)
    assert stopped.index.data.get("best") == undisturbed.index.data.get("best")
    assert "evaluation_due" not in stopped.index.data
    check_same_state(stopped, undisturbed)
    assert validation_records(ours) == validation_records(expected)
    assert (ours / "run" / "summary.json").exists()


@pytest.mark.parametrize(("task", "num_ranks", "count"), [("pretraining", 2, 26), ("visual_tokenizer", 1, 12)])
def test_runs(task: str, num_ranks: int, count: int, tokenizer_files: dict[str, str], tmp_path: Path) -> None:
    """Catches steps, evaluations and reports that are lost or repeated, and ranks that wait for each other."""
    programs = {}
    for name in ("undisturbed", "stopped"):
        folder = tmp_path / name
        folder.mkdir()
        mapping = (
            run_mapping_of(folder, tokenizer_files) if task == "pretraining" else visual_tokenizer_mapping(folder, 12)
        )
        (folder / "config.json").write_text(json.dumps(mapping))
        programs[name] = Program(folder, "beit3_ds.train", [folder / "config.json"], num_ranks)
    Program(tmp_path, "beit3_ds.cli.main", ["--help"]).finish()  # starts the server of preloaded processes
    life, _ = programs["undisturbed"].finish()
    ours, expected = tmp_path / "stopped", tmp_path / "undisturbed"

    def is_finished() -> bool:
        return (ours / "run" / "summary.json").exists()

    def forget() -> None:
        check_same_run(ours, expected, 12)
        shutil.rmtree(ours / "run")
        (ours / "visual.safetensors").unlink(missing_ok=True)

    stops = stop_repeatedly(programs["stopped"], life, random.Random(7), count, is_finished, forget)
    if not is_finished():
        programs["stopped"].finish()
    forget()
    allowed = {0, *(128 + number for number in STOP_SIGNALS), *(-number for number in STOP_SIGNALS)}
    assert all(set(stop.statuses) <= allowed for stop in stops)
    describe(task, stops)


def test_a_rank_that_waits_for_others(tokenizer_files: dict[str, str], tmp_path: Path) -> None:
    """Catches a rank that no signal ends while another rank is missing or stopped in a step."""
    mapping = run_mapping_of(tmp_path, tokenizer_files)
    mapping["beit3_ds"]["training"] |= {"total_steps": 1000}
    (tmp_path / "config.json").write_text(json.dumps(mapping))
    program = Program(tmp_path, "beit3_ds.train", [tmp_path / "config.json"], 2)
    processes = program._start()
    processes[1].send_signal(signal.SIGSTOP)
    stops = []
    for _ in range(2):  # first while the ranks meet, then while they train
        time.sleep(5)
        signalled = time.monotonic()
        processes[0].send_signal(signal.SIGTERM)
        status = processes[0].wait(60)
        stops.append(Stop(_phase(program._output()), time.monotonic() - signalled, [status], program._output()))
        what = "other ranks" if stops[1:] else "rank 1 of 2 to come to MASTER_ADDR"
        assert re.search(f"error on rank 0: SIGTERM was received, and .*waiting for {what}", program._output())
        for process in processes:
            process.kill()
            process.wait()
        if len(stops) == 1:
            processes = program._start()
            deadline = time.monotonic() + 120
            while "step 3/" not in program._output():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            processes[1].send_signal(signal.SIGSTOP)
    assert [stop.statuses for stop in stops] == [[128 + signal.SIGTERM]] * 2
    describe("a rank that waits", stops)


@needs()
def test_launches(two_hosts: list[Host], tokenizer_files: dict[str, str], tmp_path: Path) -> None:
    """Catches ranks, guards and launchers that are left behind, and a stop that is reported as a failure."""
    programs = {}
    for name in ("undisturbed", "stopped"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(run_mapping_of(folder, tokenizer_files)))
        (folder / "hosts").write_text("localhost slots=2\n")
        programs[name] = [*BEIT3, str(folder / "hosts"), str(folder / "config.json")]
    host, ours, expected = two_hosts[0], tmp_path / "stopped", tmp_path / "undisturbed"
    begun = time.monotonic()
    assert host.run(programs["undisturbed"], ENVIRONMENT, timeout=_LIFE_SECONDS).returncode == 0
    life, rng, stops = time.monotonic() - begun, random.Random(13), []
    for number in range(8):
        if (ours / "run" / "summary.json").exists():
            check_same_run(ours, expected, 12)
            shutil.rmtree(ours / "run")
        printed = tmp_path / f"printed{number}"
        with printed.open("w") as file:
            launch = host.start(programs["stopped"], ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT)
        time.sleep(rng.uniform(2, life))
        signalled = time.monotonic()
        for pid in host.pids(r"beit3_ds\.cli\.main launch"):
            host.signal(pid, rng.choice(STOP_SIGNALS))
        status = launch.wait(_LIFE_SECONDS)
        while left := host.pids("beit3_ds|deepspeed"):
            assert time.monotonic() < signalled + END_SECONDS, (left, printed.read_text())
            time.sleep(0.05)
        seconds = time.monotonic() - signalled
        lines = printed.read_text()
        stops.append(Stop(lines.splitlines()[-1][:40] if lines else "before", seconds, [status], lines))
        assert "FAILED" not in lines and status != 1, lines
    assert host.run(programs["stopped"], ENVIRONMENT, timeout=_LIFE_SECONDS).returncode == 0
    check_same_run(ours, expected, 12)
    describe("launch", stops)


def write_text_config(folder: Path) -> Path:
    mapping = small_run_mapping(0)
    mapping["beit3_ds"]["tokenizers"]["text"] |= {"path": str(folder / "text.spm"), "vocab_size": 1000}
    path = folder / "config.json"
    path.write_text(json.dumps(mapping))
    return path


def test_commands(tokenizer_files: dict[str, str], tmp_path: Path) -> None:
    """Catches files that are half written or left over, and a command that ignores signals inside a library."""
    mapping = run_mapping_of(tmp_path, tokenizer_files)
    mapping["beit3_ds"]["model"] |= {"num_layers": 6, "hidden_size": 384, "ffn_hidden_size": 1536}
    mapping["beit3_ds"]["model"] |= {"num_attention_heads": 6}
    mapping["beit3_ds"]["training"] |= {"total_steps": 1, "warmup_steps": 0, "eval_interval": 5}
    mapping["beit3_ds"]["training"].pop("best_metric")
    (tmp_path / "train.json").write_text(json.dumps(mapping))
    Program(tmp_path, "beit3_ds.train", [tmp_path / "train.json"]).finish()
    released = tmp_path / "released.pth"
    export = ["export", tmp_path / "run", released, "--format", "unilm-dual"]
    Program(tmp_path, "beit3_ds.cli.main", export).finish()
    rng = random.Random(11)
    for name, out, arguments, count in (
        ("train-text-tokenizer", "text.spm", lambda folder: [write_text_config(folder)], 8),
        ("export", "model.safetensors", lambda folder: [tmp_path / "run", folder / "model.safetensors"], 7),
        ("import", "model.safetensors", lambda folder: [released, folder / "model.safetensors"], 7),
    ):
        expected = tmp_path / f"{name}-undisturbed"
        expected.mkdir()
        life, _ = Program(tmp_path, "beit3_ds.cli.main", [name, *arguments(expected)]).finish()
        stops = []
        for number in range(count):
            folder = tmp_path / f"{name}-{number}"
            folder.mkdir()
            program = Program(tmp_path, "beit3_ds.cli.main", [name, *arguments(folder)])
            stop = program.stop(rng.uniform(0, life), rng.choice(STOP_SIGNALS))
            stops.append(stop)
            left = {path.name for path in folder.iterdir()} - {"config.json", f"{out}.recipe.json"}
            assert left <= {out}, stop
            if not left:
                program.finish()
            assert (folder / out).read_bytes() == (expected / out).read_bytes(), stop
            if stop.phase != "before or after the program":
                assert "error: stopped by " in stop.output or stop.statuses == [0], stop
        describe(name, stops)
