"""Evaluates a model: mean loss terms over the validation samples, and the task's own metrics."""

# K terms of the task.

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config.data import Split
from beit3_ds.model import LossOutput, StepFeatures, StepLoss
from beit3_ds.parallel import Mesh
from beit3_ds.pipeline.coupled_step import sum_terms
from beit3_ds.pipeline.schedule import Schedule
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.tasks import Evaluator, RankTask, Term

SourceNames = Mapping[str, Sequence[str]]
"""Short names of the validation sources of each stream, in the order of the configuration."""

VALIDATION_FOLDER = "validation"
"""Name of the folder inside the output folder that holds the result files of the last evaluation."""


def evaluate(
    schedule: Schedule,
    batches: Iterable[PackedBatch],
    prepare: Callable[[PackedBatch], PackedBatch],
    terms: Sequence[Term],
    mesh: Mesh,
    device: torch.device,
    source_names: SourceNames,
) -> dict[str, float]:
    """Returns the mean of each term over the validation batches of all ranks.

    Every rank has the same number of batches. Terms that compare samples (`Task.step_loss`) are computed over all
    samples of a source, after their features are gathered. Sends 2 x K x S elements for K terms, where S is the largest
    number of sources in any stream.

    Args:
        schedule: computes the forward passes.
        batches: this rank's batches; each holds samples of one source of each stream (`PackedBatch.sources`).
        prepare: function that moves each batch to the device and adds targets before the forward pass.
        terms: loss terms of the task.
        mesh: the ranks.
        device: this rank's device.
        source_names: names of the sources of each stream.

    Raises:
        StopRequestedError: on all ranks, if `batches` raises it (`StoppableBatches`).

    Returns:
        Means by term name, without terms of count 0. If a term's stream has several sources, also the mean over each
        source under "TERM/SOURCE".
    """
    num_sources = max((len(names) for names in source_names.values()), default=0)
    sums = torch.zeros(len(terms), max(1, num_sources), dtype=torch.float64)
    counts = torch.zeros_like(sums)
    factors = torch.ones(len(terms), device=device)
    rows = torch.arange(len(terms))
    features: list[list[StepFeatures]] = [[] for _ in range(sums.shape[1])]
    for batch, output in schedule.run_forward(batches, factors, prepare):
        sources = torch.tensor([batch.sources.get(term.stream, 0) for term in terms])
        counts[rows, sources] += torch.tensor(batch.term_counts, dtype=torch.float64)
        if isinstance(output, LossOutput):
            sums[rows, sources] += output.sums.double().cpu()
        elif isinstance(output, StepFeatures):
            features[int(sources[0])].append(output)
    if schedule.step_loss is not None and any(features):
        sums += _sum_coupled_terms(schedule.step_loss, features, mesh)
    sums, counts = _sum_over_ranks(sums, counts, mesh)
    means: dict[str, float] = {}
    for row, term in enumerate(terms):
        total, count = sums[row].sum().item(), counts[row].sum().item()
        if not count:
            continue
        means[term.name] = total / count
        names = source_names.get(term.stream, ())
        if len(names) > 1:
            own = zip(names, sums[row].tolist(), counts[row].tolist(), strict=False)
            means |= {f"{term.name}/{name}": total / count for name, total, count in own if count}
    return means


def _sum_coupled_terms(step_loss: StepLoss, features: Sequence[Sequence[StepFeatures]], mesh: Mesh) -> Tensor:
    """Returns this rank's share of each term's sum over each source, (terms, sources) float64, on the CPU.

    Args:
        step_loss: sums of the terms over a whole step.
        features: features of this rank's batches of each source; at least one batch in total.
        mesh: the ranks.
    """
    nothing = next(own[0] for own in features if own).take(slice(0))  # other ranks may have samples of a source
    with torch.no_grad():
        sums = [sum_terms(step_loss, own or [nothing], mesh) for own in features]
    return torch.stack(sums, 1).double().cpu()


def evaluate_split(
    rank_task: RankTask, evaluator: Evaluator, split: Split, folder: ResultFolder | None
) -> dict[str, float]:
    """Computes the task's metrics on a split and returns them on all ranks; all ranks call it.

    Args:
        rank_task: the task, opened for this rank.
        evaluator: the model and its ranks.
        split: split to evaluate.
        folder: folder for result files and pages, which the main rank writes; None writes none.

    Raises:
        StopRequestedError: on all ranks, if one of them was asked to stop.
    """
    metrics: dict[str, float] = evaluator.mesh.host.broadcast(rank_task.evaluate(evaluator, split, folder))
    return metrics


def mean_terms(sums: Tensor, counts: Tensor, terms: Sequence[Term], mesh: Mesh) -> dict[str, float]:
    """Returns the mean of each of the K terms over all ranks, without terms of count 0; sends 3 x K elements.

    Args:
        sums: term sums of this data-parallel rank, (K,); valid on the last stage.
        counts: term counts of this data-parallel rank, (K,); valid on all stages.
        terms: loss terms of the task.
        mesh: the ranks.
    """
    sums, counts = _sum_over_ranks(sums.double().cpu(), counts.double().cpu(), mesh)
    means = zip(terms, sums.tolist(), counts.tolist(), strict=True)
    return {term.name: total / count for term, total, count in means if count}


def _sum_over_ranks(sums: Tensor, counts: Tensor, mesh: Mesh) -> Tensor:
    """Adds the last stage's sums and the counts over all data-parallel ranks; returns both in one stacked tensor."""
    sums = mesh.pipeline.host.broadcast(sums, src=-1)
    return mesh.data_host.sum(torch.stack([sums, counts]))
