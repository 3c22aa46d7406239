"""Writes one report about a machine with GPUs: correctness of the kernels, agreement of layouts, and speed."""

import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from beit3_ds.config import ConfigError

ROOT = Path(__file__).parents[3]
"""Root folder of the clone, which contains the tests and the configurations next to the package."""

_TAIL_LINES = 15


@dataclass(frozen=True, kw_only=True)
class Step:
    """Describes one step of a certification: its heading in the report, and the commands that it runs."""

    name: str
    """Heading of the step in the report, such as the property that the step proves."""
    commands: tuple[tuple[str, ...], ...]
    """Commands to run in order in the clone; each must exit with status 0."""
    figures: str | None = None
    """Name of the JSON file that the commands write to the report's folder. The report includes its content. None if
    the commands write no such file."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Holds the outcome of one step of a certification."""

    name: str
    """Name of the step."""
    passed: bool
    """Whether all commands of the step exited with status 0."""
    seconds: float
    """Wall time of all commands of the step, in seconds."""
    commands: list[str]
    """Commands of the step, as they are typed in a shell."""
    tail: str
    """Last lines that the commands printed."""
    figures: Any
    """Content of the step's JSON file; None if the step has none."""


def plan_steps(folder: Path, num_gpus: int) -> list[Step]:
    """Returns the steps of a certificate in order.

    Args:
        folder: the report's folder.
        num_gpus: number of GPUs of this machine; with more than one, a training is also divided over them.
    """
    python, beit3 = sys.executable, str(Path(sys.executable).with_name("beit3"))
    tests = (python, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider")
    return [
        Step(name="kernels on the device", commands=((*tests, "tests", "-m", "gpu"),)),
        Step(name="operators (opcheck)", commands=((*tests, "tests/kernels", "-k", "opcheck"),)),
        Step(
            name="a training step beside float64",
            commands=((python, "-m", "beit3_ds.benchmarks.certify.parity", str(folder / "parity.json")),),
            figures="parity.json",
        ),
        *_layout_steps(folder, num_gpus, python, beit3),
        Step(
            name="kernels beside their baselines",
            commands=((beit3, "bench", "kernels", "--csv", str(folder / "kernels.csv")),),
        ),
        Step(
            name="a training step beside the reference implementation",
            commands=((beit3, "bench", "train", "--json", str(folder / "train.json")),),
            figures="train.json",
        ),
    ]


def certify(folder: Path, *, only: Sequence[str] = ()) -> int:
    """Runs the steps and rewrites `certificate.json` and `certificate.md` after each, so that no result is lost.

    Args:
        folder: folder for the report and the steps' logs; created if it does not exist.
        only: names of steps, or parts of names; empty runs all steps.

    Returns:
        0 if every step passed, 1 if one failed or there is no device.

    Raises:
        ConfigError: if the package is not installed from a clone, no step has such a name, or the folder is not empty.
    """
    folder = folder.resolve()
    if not (ROOT / "tests" / "kernels").is_dir():
        raise ConfigError(f"certify: {ROOT} holds no tests. Install from a clone (README) and run it there.")
    num_gpus = torch.cuda.device_count()
    steps = [step for step in plan_steps(folder, num_gpus) if not only or any(part in step.name for part in only)]
    if not steps:
        names = ", ".join(repr(step.name) for step in plan_steps(folder, num_gpus))
        raise ConfigError(f"certify: no step is called {' or '.join(map(repr, only))}; there are {names}.")
    if num_gpus == 0:
        print("No CUDA device: nothing is certified. On a machine with one this would run:")
        for step in steps:
            print(f"\n{step.name}:")
            print("\n".join(f"  {shlex.join(command)}" for command in step.commands))
        print("\nWith several GPUs the training is also divided over all of them and both losses are compared.")
        return 1
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"certify: {folder} is not empty. Name another folder with --out, or delete it.")
    folder.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for number, step in enumerate(steps):
        print(f"[{number + 1}/{len(steps)}] {step.name}", flush=True)
        results.append(run_step(step, folder))
        print(f"      {'passed' if results[-1].passed else 'FAILED'} in {results[-1].seconds:.0f} s", flush=True)
        write_certificate(results, describe_machine(), folder)
    print(f"report: {folder / 'certificate.md'} and {folder / 'certificate.json'}")
    return 0 if all(result.passed for result in results) else 1


def run_step(step: Step, folder: Path) -> Result:
    """Runs a step's commands in the clone until one fails, and writes their output to `NAME.log` in the folder."""
    log = folder / f"{step.name.replace(' ', '_')}.log"
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as output:
        passed = all(
            subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False).returncode == 0
            for command in step.commands
        )
    seconds = time.monotonic() - start
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])
    figures = None
    if step.figures and (folder / step.figures).exists():
        figures = json.loads((folder / step.figures).read_text(encoding="utf-8"))
    commands = [shlex.join(command) for command in step.commands]
    return Result(name=step.name, passed=passed, seconds=seconds, commands=commands, tail=tail, figures=figures)


def describe_machine() -> dict[str, Any]:
    """Returns the names of the GPUs, the versions of driver and libraries, the commit and the date."""
    return {
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": version("triton"),
        "deepspeed": version("deepspeed"),
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "HEAD") + (" (changed)" if _output("git", "status", "--short") else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_certificate(results: Sequence[Result], machine: dict[str, Any], folder: Path) -> None:
    """Writes the report as JSON and as Markdown."""
    content = {"machine": machine, "steps": [asdict(result) for result in results]}
    (folder / "certificate.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    lines = ["# Certificate", "", *(f"* {name}: {value}" for name, value in machine.items()), ""]
    lines += ["| step | result | seconds |", "|---|---|---|"]
    lines += [f"| {r.name} | {'passed' if r.passed else '**FAILED**'} | {r.seconds:.0f} |" for r in results]
    for result in results:
        lines += ["", f"## {result.name}", "", *(f"`{command}`" for command in result.commands)]
        lines += ["", "```", result.tail, "```"]
    (folder / "certificate.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _layout_steps(folder: Path, num_gpus: int, python: str, beit3: str) -> list[Step]:
    """Returns the step that trains on one GPU; with several GPUs, it also divides the training and compares losses."""
    deepspeed, config = str(Path(python).with_name("deepspeed")), "ds_configs/demo_tp2_pp2_dp2_zero3.json"
    visual = (beit3, "train", "ds_configs/quickstart_visual_tokenizer_cpu.json")
    tokenizers = {
        "runs/quickstart/text.spm": (beit3, "train-text-tokenizer", "ds_configs/quickstart_cpu.json"),
        "runs/quickstart/visual_tokenizer.safetensors": visual,
    }
    prepare = tuple(command for path, command in tokenizers.items() if not (ROOT / path).exists())

    def train(name: str, ranks: int, *settings: str) -> tuple[str, ...]:
        run = (deepspeed, "--num_gpus", str(ranks), "--module", "beit3_ds.train", config)
        changes = (f"training.output_dir={folder / name}", "training.total_steps=40", *settings)
        return (*run, *(part for change in changes for part in ("--set", change)))

    one = train("one_gpu", 1, "parallel={}")
    if num_gpus < 2:
        return [Step(name="training on one GPU under ZeRO-3", commands=(*prepare, one))]
    size = 1 << (num_gpus.bit_length() - 1)  # the largest power of two
    parallel = {"tensor_parallel_size": 2, "sequence_parallel": True, "pipeline_parallel_size": 2 if size >= 4 else 1}
    divided = train(f"{size}_gpus", size, f"parallel={json.dumps(parallel)}")
    compare = (beit3, "compare-runs", str(folder / "one_gpu"), str(folder / f"{size}_gpus"), "--tolerance", "1e-2")
    return [Step(name=f"one GPU beside {size}, divided on every axis", commands=(*prepare, one, divided, compare))]


def _output(*command: str) -> str:
    """Returns the output of a command, or "unknown" with the reason if it cannot run."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error.__class__.__name__})"
