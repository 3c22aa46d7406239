"""The terms of a task over its validation samples."""

# K terms of the task.

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.model import LossOutput
from beit3_ds.parallel import Mesh
from beit3_ds.pipeline.schedule import Schedule
from beit3_ds.tasks import Term

SourceNames = Mapping[str, Sequence[str]]
"""Short names of the validation sources of each stream, in the order of the configuration."""


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

    Every rank has the same number of batches. Sends 2 K elements per source of the stream with the most sources.

    Args:
        schedule: runs the batches forward.
        batches: this rank's batches; each holds samples of one source of each stream (`PackedBatch.sources`).
        prepare: applied to each batch first.
        terms: the task's terms.
        mesh: the ranks.
        device: this rank's device.
        source_names: source names of the streams.

    Returns:
        Means of the terms with a count, by name. A term whose stream has several sources is followed by the mean over
        each source as "TERM/SOURCE".
    """
    num_sources = max((len(names) for names in source_names.values()), default=0)
    sums = torch.zeros(len(terms), max(1, num_sources), dtype=torch.float64)
    counts = torch.zeros_like(sums)
    factors = torch.ones(len(terms), device=device)
    rows = torch.arange(len(terms))
    for batch, output in schedule.run_forward(batches, factors, prepare):
        sources = torch.tensor([batch.sources.get(term.stream, 0) for term in terms])
        counts[rows, sources] += torch.tensor(batch.term_counts, dtype=torch.float64)
        if isinstance(output, LossOutput):
            sums[rows, sources] += output.sums.double().cpu()
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


def mean_terms(sums: Tensor, counts: Tensor, terms: Sequence[Term], mesh: Mesh) -> dict[str, float]:
    """Sums over ranks and divides; terms with count 0 are left out. Sends 3 K elements.

    Args:
        sums: of this data-parallel rank's terms, (K,), known to the last stage.
        counts: of its terms, (K,), known to all stages.
        terms: the task's terms.
        mesh: the ranks.
    """
    sums, counts = _sum_over_ranks(sums.double().cpu(), counts.double().cpu(), mesh)
    means = zip(terms, sums.tolist(), counts.tolist(), strict=True)
    return {term.name: total / count for term, total, count in means if count}


def _sum_over_ranks(sums: Tensor, counts: Tensor, mesh: Mesh) -> Tensor:
    """Returns sums and counts over all data-parallel ranks, stacked; the last stage has the sums."""
    sums = mesh.pipeline.host.broadcast(sums, src=-1)
    return mesh.data_host.sum(torch.stack([sums, counts]))
