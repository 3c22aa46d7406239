"""Validation loss of each stream, and what a predictor that ignores the input would reach."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from beit3_ds.batch import LOSS_TERMS, PackedBatch
from beit3_ds.config import DataConfig, ModelConfig, short_source_names
from beit3_ds.model import LossOutput
from beit3_ds.parallel import Mesh
from beit3_ds.pipeline.schedule import Schedule
from beit3_ds.tokenizers.visual import VisualTokenizer
from beit3_ds.training.targets import encode_images, prepare_batch

TERM_STREAMS = {"image_mim": "images", "text_mlm": "texts", "pair_mim": "pairs", "pair_mlm": "pairs"}
"""The stream whose samples each of `LOSS_TERMS` is computed on."""

SourceNames = Mapping[str, Sequence[str]]
"""Short names of the validation sources of each stream, in the order of the configuration."""


def validation_source_names(data: DataConfig) -> dict[str, list[str]]:
    """Returns short names of the validation sources of each stream (`short_source_names`)."""
    return {
        name: short_source_names([source.path for source in stream.validation])
        for name, stream in data.streams().items()
    }


def evaluate(
    schedule: Schedule,
    batches: Iterable[PackedBatch],
    visual_tokenizer: VisualTokenizer | None,
    mesh: Mesh,
    device: torch.device,
    source_names: SourceNames,
) -> dict[str, float]:
    """Returns the mean cross entropy of each loss term over the validation batches of all ranks, in nats.

    Every rank has the same number of batches. Sends 8 elements per source of the stream with the most sources.

    Args:
        schedule: runs the batches forward.
        batches: this rank's batches; each holds samples of one source of each stream (`PackedBatch.sources`).
        visual_tokenizer: None on stages of a pipeline without heads.
        mesh: the ranks.
        device: this rank's device.
        source_names: source names of the streams.

    Returns:
        Losses of terms with at least one masked position, by name. A term whose stream has several sources is followed
        by the loss of each source as "TERM/SOURCE".
    """
    num_sources = max((len(names) for names in source_names.values()), default=0)
    sums = torch.zeros(len(LOSS_TERMS), max(1, num_sources), dtype=torch.float64)
    counts = torch.zeros_like(sums)
    factors = torch.ones(len(LOSS_TERMS), device=device)
    rows = torch.arange(len(LOSS_TERMS))

    def prepare(batch: PackedBatch) -> PackedBatch:
        return prepare_batch(batch, visual_tokenizer, device)

    for batch, output in schedule.run_forward(batches, factors, prepare):
        sources = torch.tensor([batch.sources.get(TERM_STREAMS[term], 0) for term in LOSS_TERMS])
        counts[rows, sources] += torch.tensor(batch.num_masked, dtype=torch.float64)
        if isinstance(output, LossOutput):
            sums[rows, sources] += output.sums.double().cpu()
    sums, counts = _sum_over_ranks(sums, counts, mesh)
    means: dict[str, float] = {}
    for row, term in enumerate(LOSS_TERMS):
        total, count = sums[row].sum().item(), counts[row].sum().item()
        if not count:
            continue
        means[term] = total / count
        names = source_names.get(TERM_STREAMS[term], ())
        if len(names) > 1:
            own = zip(names, sums[row].tolist(), counts[row].tolist(), strict=False)
            means |= {f"{term}/{name}": total / count for name, total, count in own if count}
    return means


def mean_terms(sums: Tensor, counts: Tensor, mesh: Mesh) -> dict[str, float]:
    """Sums over ranks and divides; terms without positions are left out. Sends 12 elements.

    Args:
        sums: of this data-parallel rank's cross entropies, (4,), known to the last stage.
        counts: of its masked positions, (4,), known to all stages.
        mesh: the ranks.
    """
    sums, counts = _sum_over_ranks(sums.double().cpu(), counts.double().cpu(), mesh)
    means = zip(LOSS_TERMS, sums.tolist(), counts.tolist(), strict=True)
    return {term: total / count for term, total, count in means if count}


def _sum_over_ranks(sums: Tensor, counts: Tensor, mesh: Mesh) -> Tensor:
    """Returns sums and counts over all data-parallel ranks, stacked; the last stage has the sums."""
    sums = mesh.pipeline.host.broadcast(sums, src=-1)
    return mesh.data_host.sum(torch.stack([sums, counts]))


@torch.no_grad()
def unigram_entropies(
    batches: Iterable[PackedBatch],
    visual_tokenizer: VisualTokenizer | None,
    model: ModelConfig,
    mesh: Mesh,
    device: torch.device,
    source_names: SourceNames,
) -> dict[str, float]:
    """Returns the cross entropy of the best predictor that ignores its input, in nats, for each loss term.

    It is the entropy of the frequencies of ids among all patches or tokens of the validation samples of all ranks,
    without BOS, which is never predicted. Sends two visual and two text vocabularies of integers per source.

    Args:
        batches: this rank's validation batches.
        visual_tokenizer: None on stages of a pipeline without heads.
        model: sizes of the vocabularies.
        mesh: the ranks.
        device: device of the tokenizer.
        source_names: source names of the streams.

    Returns:
        Entropies of terms with at least one id, by name. A term whose stream has several sources is followed by the
        entropy of each source's own ids as "TERM/SOURCE".
    """
    sizes = {"image_mim": model.visual_vocab_size, "text_mlm": model.text_vocab_size}
    sizes |= {"pair_mim": model.visual_vocab_size, "pair_mlm": model.text_vocab_size}
    num_sources = {term: max(1, len(source_names.get(TERM_STREAMS[term], ()))) for term in LOSS_TERMS}
    counts = {term: torch.zeros(num_sources[term], size, dtype=torch.int64) for term, size in sizes.items()}
    for batch in batches:
        if batch.tokenizer_pixels is None:
            continue  # this stage has no heads
        codes = encode_images(batch.to(device), visual_tokenizer).cpu()
        original = batch.token_ids.index_copy(0, batch.masked_tokens, batch.target_ids)
        caption_rows = torch.arange(len(original)) < sum(batch.caption_lengths)
        asked = batch.text_positions > 0
        ids = {"image_mim": codes[: batch.num_images], "pair_mim": codes[batch.num_images :]}
        ids |= {"pair_mlm": original[caption_rows & asked], "text_mlm": original[~caption_rows & asked]}
        for term, values in ids.items():
            source = batch.sources.get(TERM_STREAMS[term], 0)
            counts[term][source] += torch.bincount(values.flatten(), minlength=sizes[term])
    # The last stage has counted; the others add their zeros.
    entropies: dict[str, float] = {}
    for term, own in counts.items():
        total = mesh.data_host.sum(mesh.pipeline.host.sum(own))
        if not total.sum():
            continue
        entropies[term] = entropy(total.sum(0))
        if num_sources[term] > 1:
            named = zip(source_names[TERM_STREAMS[term]], total, strict=True)
            entropies |= {f"{term}/{name}": entropy(of_source) for name, of_source in named if of_source.sum()}
    return entropies


def entropy(counts: Tensor) -> float:
    """Entropy in nats of ids that occur `counts` times; exp of it is their perplexity."""
    shares = counts[counts > 0].double() / counts.sum()
    return float(-(shares * shares.log()).sum())
