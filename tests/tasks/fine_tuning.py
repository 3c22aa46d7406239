"""Checks that every fine-tuning task must pass: layouts, metrics on any number of ranks, and resuming.

The test of a task writes files and a configuration into a folder (`WriteConfig`), and calls these checks.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
from torch import Tensor

from beit3_ds.checkpoint.folder import CheckpointFolder, checkpoint_name
from beit3_ds.checkpoint.slices import whole_slice
from beit3_ds.config import load_run_config
from beit3_ds.planner import host_requirements
from beit3_ds.tasks import build_task
from beit3_ds.train import share_of
from beit3_ds.training.metrics_log import MetricsLog
from tests.ranks import run_ranks
from tests.run_config import small_run_mapping

Layout = tuple[int, int, int, Mapping[str, Any]]
"""Number of ranks, ZeRO stage, micro-batches per rank, and keys of the section "parallel"."""

ONE_PROCESS: Layout = (1, 0, 1, {})
COVERING: dict[str, Layout] = {
    "ZeRO-3 on 2 ranks, 2 micro-batches": (2, 3, 2, {}),
    "ZeRO-1, tensor 2, sequence parallel": (2, 1, 1, {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "ZeRO-1, pipeline 2, 4 micro-batches": (2, 1, 4, {"pipeline_parallel_size": 2}),
}
"""Layouts that use each way of dividing a step once."""
_SPLITS: dict[str, tuple[int, Mapping[str, Any]]] = {
    "1 rank": (1, {}),
    "2 ranks": (2, {}),
    "3 ranks": (3, {}),
    "tensor 2": (2, {"tensor_parallel_size": 2}),
    "tensor 2, sequence parallel": (2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "pipeline 2": (2, {"pipeline_parallel_size": 2}),
    "4 ranks": (4, {}),
    "data 2, tensor 2": (4, {"tensor_parallel_size": 2}),
    "data 2, tensor 2, sequence parallel": (4, {"tensor_parallel_size": 2, "sequence_parallel": True}),
}
_SAMPLES_PER_STEP = 8  # of every task's run
ALL: dict[str, Layout] = {
    f"{name}, ZeRO-{stage}, {micro} micro-batches": (ranks, stage, micro, parallel)
    for name, (ranks, parallel) in _SPLITS.items()
    for stage in range(4)
    for micro in (1, 2, 4)
    if micro >= parallel.get("pipeline_parallel_size", 1)
    and micro * ranks // parallel.get("tensor_parallel_size", 1) <= _SAMPLES_PER_STEP
}
"""Every combination, for slow tests; a pipeline needs at least one micro-batch per stage, none of them empty."""


MODEL = {"sub_layernorm": True, "initial_embedding_std": 0.1}
"""Keys of a model whose samples get clearly different features: the mean cosine of two images or texts is 0.6.

The gradient of a contrastive loss sums differences of features. The more similar the features, the larger the share of
rounding. At cosines of 0.995, without sub-LN, rounding makes up 3e-5 of a gradient (appendix of BENCHMARKS.md).
"""
TOLERANCE = 1e-5
"""Largest relative difference of a gradient, a loss or a metric between a layout and one process."""
CLIPPED_NORM = 0.5
EPSILON = 1e-3
"""AdamW's epsilon, about the size of an entry of gradients with the norm `CLIPPED_NORM`.

With a small epsilon, AdamW turns rounding of a gradient near 0 into a full step, so later steps could not be compared.
A small epsilon also hides a gradient that is wrong by a factor; with this epsilon, the factor changes the weights.
"""


class WriteConfig(Protocol):
    """Writes the files and configuration of a run into a folder; returns the path of the configuration."""

    def __call__(self, folder: Path, layout: Layout = ONE_PROCESS, **training: Any) -> Path: ...


def run_mapping(folder: Path, layout: Layout, task: Mapping[str, Any], **training: Any) -> dict[str, Any]:
    """Returns a run of a tiny model on a task: four steps with clipping and stochastic depth.

    The run evaluates before, between and after the steps, in batches of 3. It has no data; the caller adds datasets.
    """
    _, stage, micro_batches, parallel = layout
    mapping = small_run_mapping(stage, accumulation=micro_batches, image_size=32, drop_path_rate=0.2, **MODEL)
    own = mapping["beit3_ds"]
    mapping["gradient_clipping"] = CLIPPED_NORM
    own["task"] = dict(task)
    own["parallel"] = {**parallel, "timeout_seconds": 300}
    own["data"] = {"num_workers": 0}
    own["tokenizers"].pop("visual", None)
    own["training"] = {"output_dir": str(folder / "run"), "total_steps": 4, "warmup_steps": 1, "learning_rate": 3e-3}
    own["training"] |= {"log_interval": 1, "eval_interval": 2, "eval_batch_size": 3, "save_interval": 1}
    own["training"] |= {"adam_epsilon": EPSILON, "keep_checkpoints": 4, **training}
    return mapping


def write_json(folder: Path, mapping: Mapping[str, Any]) -> Path:
    """Writes a configuration into a folder and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(mapping))
    return path


def train(config: str) -> int:
    """Runs the trainer on one rank and returns its exit status."""
    from beit3_ds.train import main

    os.environ["OMP_NUM_THREADS"] = "1"
    return main([config])


Program = Callable[[str], int]
"""Runs the trainer on one rank with a configuration file and returns its exit status; by default `train`."""


def train_layout(
    write_config: WriteConfig, folder: Path, layout: Layout = ONE_PROCESS, program: Program = train, **training: Any
) -> Path:
    """Trains under a layout; returns the folder of the run."""
    config = write_config(folder, layout, **training)
    assert run_ranks(program, layout[0], str(config)) == [0] * layout[0]
    return folder


_MEASURED = ("step", "kind", "samples_per_second", "tokens_per_second", "mfu", "memory_gib", "data_wait")
_TIMES = ("seconds", "work_seconds", "data_seconds", "work_slowest_rank", "data_slowest_rank", "tokens_in_pipeline")


def figures(folder: Path, kind: str) -> list[dict[str, float]]:
    """Returns the records of one kind ("train" or "validation") without values that depend on time or machine."""
    records = [record for record in MetricsLog(folder / "run" / "metrics.jsonl").records() if record["kind"] == kind]
    return [
        {
            key: value
            for key, value in record.items()
            if key not in _MEASURED and not key.startswith(_TIMES) and isinstance(value, int | float)
        }
        for record in records
    ]


def check_layout_trains_the_same(
    write_config: WriteConfig,
    one_process: Path,
    folder: Path,
    layout: Layout,
    program: Program = train,
) -> None:
    """Compares every step of a run with one process: gradient tensors, gradient norm, loss terms and metrics.

    Args:
        write_config: writes the files of the run.
        one_process: folder of the run in one process.
        folder: folder for the new run.
        layout: layout of the new run.
        program: trains on one rank, as in the run in one process.

    Prints the largest differences, for docs/tested_layouts.md.
    """
    train_layout(write_config, folder, layout, program)
    steps = check_same_gradients(folder, one_process)
    worst = {"gradient, first step": steps[0], "gradient": max(steps)}
    for kind, count in (("train", 4), ("validation", 3)):
        found, expected = figures(folder, kind), figures(one_process, kind)
        assert len(found) == len(expected) == count
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=TOLERANCE)
            for name, value in theirs.items():
                difference = abs(ours[name] - value) / (abs(value) or 1)
                worst[f"{kind} {name}"] = max(worst.get(f"{kind} {name}", 0), difference)
    print(layout, ", ".join(f"{name} {difference:.1e}" for name, difference in worst.items()))


def check_same_gradients(folder: Path, one_process: Path) -> list[float]:
    """Compares the clipped gradients of every step, tensor by tensor, in the Euclidean norm.

    Returns the largest difference of each step, as a share of the norm that bounds it.

    A difference may be `TOLERANCE` of the tensor's gradient, or 1/100 of this share of the whole gradient. The second
    rule serves gradients that are small differences of large sums, such as that of the key bias, which is 0 except for
    rounding.
    """
    worst: list[float] = []
    steps = zip(clipped_gradients(folder), clipped_gradients(one_process), strict=True)
    for step, (ours, expected) in enumerate(steps, 1):
        assert ours.keys() == expected.keys()
        norms = {name: gradient.norm().item() for name, gradient in expected.items()}
        smallest = 0.01 * math.hypot(*norms.values())
        worst.append(0.0)
        for name, gradient in expected.items():
            difference = (ours[name] - gradient).norm().item()
            message = f"step {step}, {name}: {difference:.2e} of {norms[name]:.2e}"
            assert difference <= TOLERANCE * max(norms[name], smallest), message
            worst[-1] = max(worst[-1], difference / max(norms[name], smallest))
    return worst


def clipped_gradients(folder: Path) -> Iterator[dict[str, Tensor]]:
    """Yields the clipped gradient of each tensor, in float64, for each of the four steps of a run.

    Gradients are computed from AdamW's first moments m, which each step saves in float32: m_t = b m_(t-1) + (1 - b)
    g_t. Rounding of m adds a relative error of at most 6e-8 (|m_t| + b |m_(t-1)|) / (1 - b) |g_t| to g_t. For gradients
    of constant norm, b = 0.9 and four steps, that is 4e-7, far below the tolerance.
    """
    config = load_run_config(folder / "config.json")
    decay = config.training.adam_betas[0]
    before: dict[str, Tensor] = {}
    for step in range(1, config.training.total_steps + 1):
        run = CheckpointFolder(folder / "run" / "checkpoints" / checkpoint_name(step))
        moments = {name: run.read_kind("exp_avg", name, whole_slice(run.shape(name))).double() for name in run.names()}
        run.close()
        yield {name: (moment - decay * before.get(name, 0)) / (1 - decay) for name, moment in moments.items()}
        before = moments


def check_resumes_bit_for_bit(
    write_config: WriteConfig, one_process: Path, folder: Path, program: Program = train
) -> None:
    """Checks that a run resumed from the checkpoint of step 2 has the records of an uninterrupted run, bit for bit."""
    shutil.copytree(one_process / "run", folder / "run")
    for step in (3, 4):
        shutil.rmtree(folder / "run" / "checkpoints" / f"step-{step:08d}")
    config = write_config(folder)
    assert run_ranks(program, 1, str(config)) == [0]
    for kind in ("train", "validation"):
        names = ("loss", "grad_norm") if kind == "train" else figures(one_process, kind)[0]
        picked = [[{n: record[n] for n in names} for record in figures(run, kind)] for run in (folder, one_process)]
        assert picked[0] == picked[1] and len(picked[0]) >= 3


def check_planned_shared_memory(write_config: WriteConfig, folder: Path) -> None:
    """Checks that the planner counts the shared memory that all ranks together may fill, and little more than that.

    The layout has two pipeline stages. The second stage reads samples, but drops their images.
    """
    config_file = write_config(folder, COVERING["ZeRO-1, pipeline 2, 4 micro-batches"])
    mapping = json.loads(config_file.read_text())
    mapping["beit3_ds"]["data"] |= {"num_workers": 2, "prefetch_steps": 1}
    config = load_run_config(str(write_json(folder, mapping)))
    (folder / "run").mkdir()  # the trainer makes the output folder before it opens the task
    shared, step_bytes, pixel_bytes = 0, 0, 0
    for rank in range(2):
        share = share_of(config.parallel.rank_coords(rank, 2), config.parallel, data_parallel_size=1)
        dataset = build_task(config).open(share).dataset
        assert dataset is not None
        shared += dataset.prefetch.num_bytes
        step_bytes += dataset.prefetch.step_bytes
        pixel_bytes += sum(batch.pixels.nbytes for batch in dataset[0].micro_batches if batch.pixels is not None)
    node = host_requirements(config, 2, 2)
    assert node.shm == shared
    assert not node.validation, "metrics are computed over samples that are not kept"
    assert pixel_bytes < step_bytes < 1.3 * pixel_bytes  # catches images of the second stage, or of the tokenizer


def evaluate(arguments: Sequence[str]) -> int:
    """Runs `beit3_ds.evaluate` on one rank and returns its exit status."""
    from beit3_ds.evaluate import main

    os.environ["OMP_NUM_THREADS"] = "1"
    return main(list(arguments))


def check_metrics_do_not_depend_on_ranks(
    write_config: WriteConfig, one_process: Path, folder: Path, split: str = "validation"
) -> dict[str, float]:
    """Checks that result files of an evaluation are byte for byte equal on 1, 2 and 3 ranks; returns the metrics."""
    weights, written = str(one_process / "run"), []
    for num_ranks in (1, 2, 3):
        config = write_config(folder / str(num_ranks), (num_ranks, 0, 1, {}))
        out = folder / str(num_ranks) / "out"
        arguments = [str(config), "--weights", weights, "--split", split, "--out", str(out)]
        assert run_ranks(evaluate, num_ranks, arguments) == [0] * num_ranks
        files = [path for path in sorted(out.rglob("*")) if path.is_file()]
        written.append({str(path.relative_to(out)): path.read_bytes() for path in files})
    assert written[0] == written[1] == written[2]
    metrics: dict[str, float] = json.loads(written[0]["metrics.json"])["metrics"]
    return metrics
