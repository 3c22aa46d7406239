"""Describes a run's versions, hosts, devices, layout and steps in one line at its start."""

import subprocess
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import deepspeed
import torch

from beit3_ds.checkpoint.engine_state import EngineState
from beit3_ds.config import RunConfig
from beit3_ds.parallel import Mesh


def describe_startup(config: RunConfig, mesh: Mesh, state: EngineState, device: torch.device, first_step: int) -> str:
    """Returns one line that describes the run. All ranks must call this function, and each sends a short text.

    Args:
        config: the run's configuration.
        mesh: mesh of all ranks.
        state: engine state of this rank.
        device: device of this rank.
        first_step: index of the first step that is still to do, from 0.
    """
    elements = sum(tensor.shape.numel() for tensor in state.local_tensors.values())
    own = (_describe_device(device), elements if mesh.coords == (mesh.pipeline.rank, 0, 0) else 0)
    found = mesh.host.gather(own)
    devices, parameters = [device for device, _ in found], sum(number for _, number in found)
    training, parallel = config.training, config.parallel
    return " | ".join(
        [
            f"beit3_ds {version('beit3_ds')}{_find_commit()}, torch {torch.__version__}, "
            f"DeepSpeed {deepspeed.__version__}",
            _describe_hosts(mesh.hosts),
            ", ".join(f"{number} x {device}" for device, number in Counter(devices).items()),
            f"{mesh.describe_layout()}, ZeRO-{config.options.zero_stage}, {config.options.precision}",
            _describe_step(config, mesh.data_parallel_size),
            f"{parameters:,} parameters",
            f"steps {first_step + 1} to {training.total_steps}, seed {training.seed}",
            f"a rank is lost after {parallel.heartbeat_timeout_seconds} s, stalled after {parallel.timeout_seconds} s",
            f"output in {Path(training.output_dir).resolve()}",
        ]
    )


def _describe_step(config: RunConfig, data_parallel_size: int) -> str:
    shares = config.step_shares(data_parallel_size)
    text = f"{config.samples_per_step} samples per step in {config.gradient_accumulation_steps} micro-batches per rank"
    return (
        text
        if shares.is_even
        else f"{text}, uneven: {shares.fewest_rank_samples} or {shares.most_rank_samples} per rank"
    )


def _describe_hosts(hosts: Sequence[str]) -> str:
    counts = Counter(hosts)
    first = next(iter(counts))
    numbers = sorted(set(counts.values()))
    ranks = " or ".join(map(str, numbers))
    names = first if len(counts) == 1 else f"first {first}, last {hosts[-1]}"
    return f"{len(counts)} host{'s' if len(counts) > 1 else ''} x {ranks} ranks ({names})"


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"


def _find_commit() -> str:
    """Returns the source code's Git commit, in parentheses and after a space; empty if the commit is unknown."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
    return f" ({found})"
