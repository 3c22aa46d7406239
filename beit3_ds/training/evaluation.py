"""Held-out loss of each stream, and what a predictor that ignores the input would reach."""

from collections.abc import Iterable

import torch
from torch import Tensor

from beit3_ds.batch import LOSS_TERMS, PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.model import LossOutput
from beit3_ds.parallel import Mesh
from beit3_ds.pipeline.schedule import Schedule
from beit3_ds.tokenizers.visual import VisualTokenizer
from beit3_ds.training.targets import prepare_batch


def evaluate(
    schedule: Schedule,
    batches: Iterable[PackedBatch],
    visual_tokenizer: VisualTokenizer | None,
    mesh: Mesh,
    device: torch.device,
) -> dict[str, float]:
    """Mean cross entropy of each loss term over the held-out batches of all ranks, in nats.

    Every rank brings the same number of batches. Sends 12 elements.

    Returns:
        Terms with at least one masked position, by name.
    """
    sums = torch.zeros(len(LOSS_TERMS), dtype=torch.float64)
    counts = torch.zeros(len(LOSS_TERMS), dtype=torch.float64)
    factors = torch.ones(len(LOSS_TERMS), device=device)

    def prepare(batch: PackedBatch) -> PackedBatch:
        return prepare_batch(batch, visual_tokenizer, device)

    for batch, output in schedule.run_forward(batches, factors, prepare):
        counts += torch.tensor(batch.num_masked)
        if isinstance(output, LossOutput):
            sums += output.sums.double().cpu()
    return mean_terms(sums, counts, mesh)


def mean_terms(sums: Tensor, counts: Tensor, mesh: Mesh) -> dict[str, float]:
    """Sums over ranks and divides; terms without positions are left out. Sends 12 elements.

    Args:
        sums: of this data-parallel rank's cross entropies, (4,), known to the last stage.
        counts: of its masked positions, (4,), known to all stages.
        mesh: the ranks.
    """
    sums = mesh.pipeline.host.broadcast(sums.double().cpu(), source=-1)
    sums, counts = mesh.data_host.sum(torch.stack([sums, counts.double().cpu()]))
    means = zip(LOSS_TERMS, sums.tolist(), counts.tolist(), strict=True)
    return {term: total / count for term, total, count in means if count}


@torch.no_grad()
def unigram_entropies(
    batches: Iterable[PackedBatch],
    visual_tokenizer: VisualTokenizer | None,
    model: ModelConfig,
    mesh: Mesh,
    device: torch.device,
) -> dict[str, float]:
    """For each loss term the cross entropy of the best predictor that ignores its input, in nats.

    That is the entropy of how often each id occurs among all patches or tokens (BOS left out: it is never asked for) of
    the held-out samples of all ranks. Sends two visual and two text vocabularies of integers.

    Args:
        batches: this rank's held-out batches.
        visual_tokenizer: None on stages of a pipeline without heads.
        model: sizes of the vocabularies.
        mesh: the ranks.
        device: of the tokenizer.

    Returns:
        Terms with at least one id, by name.
    """
    sizes = {"image_mim": model.visual_vocab_size, "text_mlm": model.text_vocab_size}
    sizes |= {"pair_mim": model.visual_vocab_size, "pair_mlm": model.text_vocab_size}
    counts = {term: torch.zeros(size, dtype=torch.int64) for term, size in sizes.items()}
    for batch in batches:
        if visual_tokenizer is None:
            continue
        assert batch.tokenizer_pixels is not None, "the stage with the heads reads the tokenizer's view"
        codes = visual_tokenizer.encode(batch.tokenizer_pixels.to(device)).cpu()
        original = batch.token_ids.index_copy(0, batch.masked_tokens, batch.target_ids)
        caption_rows = torch.arange(len(original)) < sum(batch.caption_lengths)
        asked = batch.text_positions > 0
        ids = {"image_mim": codes[: batch.num_images], "pair_mim": codes[batch.num_images :]}
        ids |= {"pair_mlm": original[caption_rows & asked], "text_mlm": original[~caption_rows & asked]}
        for term, values in ids.items():
            counts[term] += torch.bincount(values.flatten(), minlength=sizes[term])
    # The last stage has counted; the others add their zeros.
    totals = {term: mesh.data_host.sum(mesh.pipeline.host.sum(count)) for term, count in counts.items()}
    return {term: entropy(total) for term, total in totals.items() if total.sum()}


def entropy(counts: Tensor) -> float:
    """Entropy in nats of ids that occur `counts` times; exp of it is their perplexity."""
    shares = counts[counts > 0].double() / counts.sum()
    return float(-(shares * shares.log()).sum())
