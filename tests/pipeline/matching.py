"""Implements a toy task whose loss compares all images and texts of a step; runs its steps in any layout."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.batch import PackedBatch, StepBatch
from beit3_ds.config import ModelConfig, RunConfig
from beit3_ds.config.task import TaskConfig
from beit3_ds.model import Head, StepFeatures
from beit3_ds.parallel import Mesh, TensorParallel
from beit3_ds.tasks import RankShare, RankTask, Task, Term
from tests.batches import merge_batches, random_batch
from tests.training.layouts import Layout
from tests.training.steps import CLIP, Deal, config_for, is_key_bias, logical_tensors, norm_of_all

if TYPE_CHECKING:
    from beit3_ds.pipeline.schedule import Schedule

NUM_PAIRS = 8
SOURCES = (range(5), range(5, 8))
NUM_STEPS = 2  # the second step uses buffers left by the first


class MatchingHead(Head):
    def __init__(self, config: ModelConfig, tensor: TensorParallel) -> None:
        super().__init__()
        self.image, self.text = (nn.Linear(config.hidden_size, 16, bias=False) for _ in range(2))
        self.log_scale = nn.Parameter(torch.empty(1))

    def forward(self, h_MD: Tensor, batch: PackedBatch, with_loss: bool) -> StepFeatures:
        images, texts = h_MD.split([batch.num_images, batch.num_texts])
        rows = {
            "image": F.normalize(self.image(images).float(), dim=1),
            "text": F.normalize(self.text(texts).float(), dim=1),
            "id": torch.arange(batch.num_images),  # integers are gathered and get no gradient
        }
        return StepFeatures(rows, {"scale": 3 * self.log_scale.float().exp()})


class Matching(Task):
    terms = (Term("to_text", "images", "", 0.75), Term("to_image", "images", "", 0.25), Term("right", "images", "", 0))

    def build_head(self, model: ModelConfig, tensor: TensorParallel) -> MatchingHead:
        return MatchingHead(model, tensor)

    @property
    def step_loss(self) -> Any:
        return matching_loss

    def open(self, share: RankShare) -> RankTask:
        return RankTask()


TASK = Matching


def matching_loss(features: StepFeatures) -> Tensor:
    logits = features.shared["scale"] * features.rows["image"] @ features.rows["text"].t()
    assert len(features.rows["id"]) == len(logits), "integers are gathered like features"
    labels = torch.arange(len(logits))
    right = (logits.argmax(1) == labels).sum().float()
    losses = [F.cross_entropy(x, labels, reduction="sum") for x in (logits, logits.t())]
    return torch.stack([*losses, right])


def matching_config(zero_stage: int, checkpointing: str = "none", **parallel: Any) -> RunConfig:
    config = config_for(zero_stage, checkpointing=checkpointing, **parallel)
    return dataclasses.replace(config, task=TaskConfig(name="tests.pipeline.matching"))


def build_batch(config: RunConfig, step: int, numbers: Sequence[int]) -> PackedBatch:
    """Packs some pairs of a step as one micro-batch: first images, then their texts."""
    pairs = [random_batch(config.model, 1, 0, 1, seed=10 * step + i, drop_path=True) for i in numbers]
    batch = merge_batches(pairs) if pairs else random_batch(config.model, 0, 0, 0, drop_path=True)
    lengths = torch.tensor(batch.text_lengths, dtype=torch.int64)
    text_rows = batch.boundaries[2] + lengths.cumsum(0) - lengths
    rows = torch.cat([torch.arange(len(numbers)) * batch.image_length, text_rows])
    counts: dict[str, Any] = {"head_row_counts": (len(numbers), 0, 0, len(numbers)), "term_counts": (len(numbers),) * 3}
    return dataclasses.replace(batch, head_rows=rows, targets={}, **counts)


def measure_matching(config: RunConfig, mesh: Mesh, deals: Sequence[Deal]) -> dict[str, Tensor]:
    """Runs the steps; returns losses, norms, this stage's gradients and weights, and losses by source."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    from beit3_ds.tasks import build_task
    from beit3_ds.training.broken_records import BrokenRecords, StepCounts
    from beit3_ds.training.engine import apply_update, build_schedule
    from beit3_ds.training.loss import build_loss_factors

    task = build_task(config)
    schedule = build_schedule(task, mesh)
    named = dict(schedule.engine.module.named_parameters())
    result: dict[str, Tensor] = {}
    for step in range(NUM_STEPS):
        deal = deals[step % len(deals)][mesh.data_parallel_rank]
        batches = tuple(build_batch(config, step, numbers) for numbers in deal)
        counts, _ = StepCounts(BrokenRecords(0, mesh.data_host), mesh).agree(
            StepBatch(step=step, micro_batches=batches)
        )
        factors = build_loss_factors(counts, task.terms, mesh.data_parallel_size)
        sums = schedule.accumulate_gradients(batches, factors, lambda batch: batch)
        gradients = {name: safe_get_full_grad(p) for name, p in named.items()}
        result |= logical_tensors(gradients, named, mesh, f"gradient {step}")
        result[f"loss {step}"] = mesh.pipeline.host.broadcast(mesh.data_host.sum(sums), src=-1) / counts
        result[f"norm {step}"] = torch.tensor(apply_update(schedule.engine, mesh))
        full = safe_get_full_fp32_param if config.deepspeed["zero_optimization"]["stage"] else torch.clone
        result |= logical_tensors({name: full(p) for name, p in named.items()}, named, mesh, f"weight {step}")
    result |= evaluate_sources(config, schedule, mesh)
    schedule.engine.destroy()
    return result


def evaluate_sources(config: RunConfig, schedule: "Schedule", mesh: Mesh) -> dict[str, Tensor]:
    """Returns the mean of each loss term over each source.

    Ranks have different pairs of a source, in different orders, or none.
    """
    from beit3_ds.training.evaluation import evaluate

    shares = [pairs[mesh.data_parallel_rank :: mesh.data_parallel_size] for pairs in SOURCES]
    batches = [
        dataclasses.replace(build_batch(config, 0, numbers), sources={"images": source})
        for source, numbers in enumerate(shares)
    ][:: 1 if mesh.data_parallel_rank % 2 else -1]
    device = schedule.engine.device
    means = evaluate(schedule, batches, lambda batch: batch, Matching.terms, mesh, device, {"images": ["a", "b"]})
    return {f"evaluation {name}": torch.tensor(mean) for name, mean in means.items()}


def plain_steps() -> dict[str, Tensor]:
    """Runs the steps of `measure_matching` on whole batches in one process, without DeepSpeed."""
    from beit3_ds.tasks import build_task
    from beit3_ds.training.engine import build_model
    from beit3_ds.training.optimizer import build_optimizer

    config = matching_config(0)
    task = build_task(config)
    model = build_model(task)
    optimizer = build_optimizer(model, config)
    weights = torch.tensor([term.weight for term in task.terms])
    result: dict[str, Tensor] = {}
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        losses = matching_loss(model(build_batch(config, step, range(NUM_PAIRS)), weights)) / NUM_PAIRS
        (losses * weights).sum().backward()
        result |= {f"gradient {step} {name}": p.grad.clone() for name, p in model.named_parameters()}
        result[f"loss {step}"] = losses.detach()
        result[f"norm {step}"] = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        result |= {f"weight {step} {name}": p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        sums = [matching_loss(model(build_batch(config, 0, pairs), weights)) for pairs in SOURCES]
    for number, term in enumerate(task.terms):
        result[f"evaluation {term.name}"] = sum(sums)[number] / NUM_PAIRS
        for source, pairs in enumerate(SOURCES):
            result[f"evaluation {term.name}/{'ab'[source]}"] = sums[source][number] / len(pairs)
    return result


def errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns the error of each tensor outside the tolerance: 1e-5 of its 2-norm plus 1e-7 of the norm of its kind."""
    wrong = {}
    for name, value in found.items():
        difference = float((value - expected[name]).norm())
        all_norm = norm_of_all(expected, name.rsplit(" ", 1)[0])
        if not is_key_bias(name) and not difference <= 1e-5 * float(expected[name].norm()) + 1e-7 * all_norm:
            wrong[name] = difference
    return wrong


def measure_layout(
    layout: Layout, cells: Sequence[tuple[int, str, Sequence[Deal]]], expected: Path
) -> list[dict[str, float]]:
    """Runs all cells of one layout on one rank; returns the errors that exceed the allowed ones.

    Args:
        layout: layout of the ranks.
        cells: ZeRO stage, checkpointing mode, and division of the pairs, per cell.
        expected: file of the expected tensors.
    """
    from beit3_ds.runtime.process_group import init_process_group

    mesh = init_process_group(config_for(0, **layout.parallel).parallel)
    results = []
    for zero_stage, checkpointing, deals in cells:
        found = measure_matching(matching_config(zero_stage, checkpointing, **layout.parallel), mesh, deals)
        assert found, "every stage has parameters"
        results.append(errors(found, torch.load(expected)))
    mesh.close()
    return results
