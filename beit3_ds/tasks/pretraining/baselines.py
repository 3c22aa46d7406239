"""Computes a baseline for each loss term of pretraining: the loss of a predictor that knows only the frequency of each
token id or visual code.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.parallel import Mesh
from beit3_ds.tasks.pretraining.targets import MASKED_TOKENS, TARGET_IDS, TOKENIZER_PIXELS, Encode, encode_images

TERM_STREAMS = {"image_mim": "images", "text_mlm": "texts", "pair_mim": "pairs", "pair_mlm": "pairs"}
"""Maps each loss term of pretraining to the kind of samples from which the term is computed, in the order of the terms.
"""


@torch.no_grad()
def unigram_entropies(
    batches: Iterable[PackedBatch],
    encode: Encode | None,
    model: ModelConfig,
    mesh: Mesh,
    device: torch.device,
    source_names: Mapping[str, Sequence[str]],
) -> dict[str, float]:
    """Returns, per loss term, the cross entropy in nats of the best predictor that ignores the input.

    This predictor gives each id a probability equal to the id's frequency. The cross entropy is then the entropy of
    these frequencies. The frequencies are those over all patches or tokens of the validation samples of all ranks. BOS
    does not count, because BOS is never predicted. The ranks sum their counts, one integer per source and vocabulary
    entry.

    Args:
        batches: this rank's validation batches.
        encode: encodes images; None on pipeline stages without heads.
        model: model configuration with the vocabulary sizes.
        mesh: mesh of all ranks.
        device: device of the encoder.
        source_names: short names of the validation sources, by kind of samples ("images", "pairs" or "texts").

    Returns:
        Entropy by term name, for each term with at least one id. If the samples of a term come from several sources,
        also the entropy per source, under the name "TERM/SOURCE".
    """
    sizes = {"image_mim": model.visual_vocab_size, "text_mlm": model.text_vocab_size}
    sizes |= {"pair_mim": model.visual_vocab_size, "pair_mlm": model.text_vocab_size}
    num_sources = {term: max(1, len(source_names.get(TERM_STREAMS[term], ()))) for term in TERM_STREAMS}
    counts = {term: torch.zeros(num_sources[term], size, dtype=torch.int64) for term, size in sizes.items()}
    for batch in batches:
        if TOKENIZER_PIXELS not in batch.targets:
            continue  # this stage has no heads
        codes = encode_images(batch.to(device), encode).cpu()
        original = batch.token_ids.index_copy(0, batch.targets[MASKED_TOKENS], batch.targets[TARGET_IDS])
        caption_rows = torch.arange(len(original)) < sum(batch.caption_lengths)
        asked = batch.text_positions > 0
        ids = {"image_mim": codes[: batch.num_images], "pair_mim": codes[batch.num_images :]}
        ids |= {"pair_mlm": original[caption_rows & asked], "text_mlm": original[~caption_rows & asked]}
        for term, values in ids.items():
            source = batch.sources.get(TERM_STREAMS[term], 0)
            counts[term][source] += torch.bincount(values.flatten(), minlength=sizes[term])
    # Only the last stage has counts; the other stages add zeros.
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
    """Returns the entropy in nats of ids that occur `counts` times."""
    shares = counts[counts > 0].double() / counts.sum()
    return float(-(shares * shares.log()).sum())
