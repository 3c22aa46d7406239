"""Evaluates a model: means of the loss terms over validation samples, and the task's own metrics."""

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
"""Short names of the validation sources, by kind of sample ("images", "pairs" or "texts"), in the order of the
configuration."""

VALIDATION_FOLDER = "validation"
"""Name of the folder for the last evaluation's result files, in the output folder."""


def evaluate(
    schedule: Schedule,
    batches: Iterable[PackedBatch],
    prepare: Callable[[PackedBatch], PackedBatch],
    terms: Sequence[Term],
    mesh: Mesh,
    device: torch.device,
    source_names: SourceNames,
) -> dict[str, float]:
    """Returns the mean of each loss term over the validation batches of all ranks.

    All ranks must have the same number of batches. Terms that compare samples with each other (`Task.step_loss`) are
    computed over all samples of a source; the ranks first gather the features of these samples. Let K be the number of
    terms, and S the number of sources of the kind (images, pairs or texts) with the most sources. In a pipeline, the
    last stage broadcasts K x S sums. The data-parallel ranks then all-reduce K x S sums and K x S counts.

    Args:
        schedule: schedule that runs the forward passes.
        batches: this rank's batches. The samples of one kind in a batch are from one source (`PackedBatch.sources`).
        prepare: function that moves a batch to the device and adds targets.
        terms: loss terms of the task.
        mesh: mesh of all ranks.
        device: this rank's device.
        source_names: names of the sources, by kind of sample.

    Raises:
        StopRequestedError: on all ranks, if `batches` raises it (`StoppableBatches`).

    Returns:
        Means by term name, without terms of count 0. If a term's samples come from several sources, also the mean over
        each source, under "TERM/SOURCE".
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
    """On the first data-parallel rank, returns the sum of each term for each source. On the other ranks, returns zeros.

    Each sum is over the features of all data-parallel ranks. All data-parallel ranks of the last stage must call this
    function, because it gathers the features.

    Args:
        step_loss: function that computes the sum of each loss term from features.
        features: features of this rank's batches, one list per source; at least one batch in total.
        mesh: mesh of all ranks.

    Returns:
        Sums, (terms, sources) float64 on the CPU.
    """
    nothing = next(own[0] for own in features if own).take(slice(0))  # for sources without own samples
    with torch.no_grad():
        sums = [sum_terms(step_loss, own or [nothing], mesh) for own in features]
    return torch.stack(sums, 1).double().cpu()


def evaluate_split(
    rank_task: RankTask, evaluator: Evaluator, split: Split, folder: ResultFolder | None
) -> dict[str, float]:
    """Computes the task's metrics on a split, and returns them on all ranks. All ranks must call this function.

    Args:
        rank_task: the task on this rank, with its files open.
        evaluator: the model and its mesh.
        split: split to evaluate.
        folder: folder in which the main rank writes result files and pages. With None, no files are written.

    Raises:
        StopRequestedError: on all ranks, if a rank received a stop signal.
    """
    metrics: dict[str, float] = evaluator.mesh.host.broadcast(rank_task.evaluate(evaluator, split, folder))
    return metrics


def mean_terms(sums: Tensor, counts: Tensor, terms: Sequence[Term], mesh: Mesh) -> dict[str, float]:
    """Returns the mean of each loss term over all ranks, by name. Leaves out a term whose count is 0 on all ranks.
    Broadcasts K sums from the last pipeline stage, and all-reduces K sums and K counts.

    Args:
        sums: sum of each term on this data-parallel rank, (K,); only the values of the last pipeline stage are used.
        counts: count of each term on this data-parallel rank, (K,); must be equal on all pipeline stages.
        terms: the K loss terms of the task.
        mesh: mesh of all ranks.
    """
    sums, counts = _sum_over_ranks(sums.double().cpu(), counts.double().cpu(), mesh)
    means = zip(terms, sums.tolist(), counts.tolist(), strict=True)
    return {term.name: total / count for term, total, count in means if count}


def _sum_over_ranks(sums: Tensor, counts: Tensor, mesh: Mesh) -> Tensor:
    """Returns the totals of `sums` and `counts` over all data-parallel ranks, stacked in this order, (2, ...).

    The values of `sums` come from the last pipeline stage. `counts` must be equal on all stages.
    """
    sums = mesh.pipeline.host.broadcast(sums, src=-1)
    return mesh.data_host.sum(torch.stack([sums, counts]))
