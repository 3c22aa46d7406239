"""Compares outputs and gradients of tensor-parallel layers with the undivided computation."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from beit3_ds.config import ParallelConfig
from beit3_ds.kernels.ops.label_smoothing import smoothed_cross_entropy_reference
from beit3_ds.parallel import (
    Mesh,
    TensorParallel,
    VocabParallelEmbedding,
    VocabParallelHead,
    logical_part,
    own_part,
)
from beit3_ds.parallel.vocabulary import PADDING_BIAS
from beit3_ds.training.optimizer import build_optimizer
from tests.ranks import run_ranks
from tests.run_config import small_run_config

RANKS = 3
ROWS, HIDDEN, VOCAB = 7, 12, 200


@given(st.integers(1, 16), st.integers(16, 70_000))
@example(8, 520)  # the last three ranks hold padding only
def test_vocabulary_parts_cover_it_once_and_are_equal(size: int, vocab: int) -> None:
    splits = [TensorParallel(rank=rank, size=size).split_vocabulary(vocab) for rank in range(size)]
    assert [split.start for split in splits] == [0, *(split.stop for split in splits[:-1])]
    assert splits[-1].stop == vocab
    alignment = 64 if size > 1 and vocab >= 64 * size else 1
    (part,) = {split.local_size for split in splits}
    assert part % alignment == 0
    assert all(split.padding == 0 for split in splits if split.stop < vocab)  # padding is at the end
    assert sum(split.padding for split in splits) < size * alignment


def build_mesh() -> Mesh:
    from beit3_ds.runtime.process_group import init_process_group

    return init_process_group(ParallelConfig(tensor_parallel_size=RANKS))


def measure_vocabulary(chunk_size: int | None, smoothing: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Runs three AdamW steps on one rank; returns pairs of its tensors and those of the undivided network."""
    mesh = build_mesh()
    torch.manual_seed(0)
    whole = nn.ModuleDict({"word": nn.Embedding(VOCAB, HIDDEN), "mlm": nn.Linear(HIDDEN, VOCAB)})
    embedding = VocabParallelEmbedding(VOCAB, HIDDEN, mesh.tensor)
    head = VocabParallelHead(HIDDEN, VOCAB, chunk_size, mesh.tensor, smoothing)
    divided = nn.ModuleDict({"word": embedding, "mlm": head})
    for model in (whole, divided):
        model.double()  # Adam amplifies rounding errors of tiny gradients
    parameters = [(name, p, whole.get_parameter(name)) for name, p in divided.named_parameters()]
    with torch.no_grad():
        for _, own, expected in parameters:
            logical_part(own).copy_(own_part(own, expected))
    optimizers = [build_optimizer(model, small_run_config(0)) for model in (whole, divided)]

    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for step in range(3):
        ids, targets = torch.randint(0, VOCAB, (2, ROWS))
        upstream = torch.randn(ROWS, dtype=torch.float64)
        rows, mlm = whole["word"](ids), whole["mlm"]
        logits = mlm(rows)
        loss = smoothed_cross_entropy_reference(rows, mlm.weight, mlm.bias, targets, smoothing)
        own_logits, (own_loss, correct) = head.logits(embedding(ids)), head(embedding(ids), targets)
        pairs |= {f"logits {step}": (own_logits, logits), f"loss {step}": (own_loss, loss)}
        pairs[f"correct {step}"] = (correct, logits.argmax(1) == targets)
        for optimizer, losses in zip(optimizers, (loss, own_loss), strict=True):
            optimizer.zero_grad()
            (losses * upstream).sum().backward()
            optimizer.step()
        for name, own, expected in parameters:
            assert own.grad is not None and expected.grad is not None
            pairs[f"gradient {step} {name}"] = (
                logical_part(own, own.grad).clone(),
                own_part(own, expected.grad).clone(),
            )
            pairs[f"weight {step} {name}"] = (logical_part(own).clone(), own_part(own, expected).clone())
            padding = slice(len(logical_part(own)), None)
            assert not own.grad[padding].any(), f"{name}: padding has a gradient"
            assert (own[padding] == (PADDING_BIAS if name == "mlm.bias" else 0)).all(), f"{name}: padding has moved"
    return {name: (ours.detach(), expected.detach()) for name, (ours, expected) in pairs.items()}


@pytest.mark.parametrize(("chunk_size", "smoothing"), [(3, 0.0), (None, 0.1)])
def test_divided_vocabulary(chunk_size: int | None, smoothing: float) -> None:
    """Checks a vocabulary whose shards have no padding, some padding, and only padding.

    A padding bias of 0, in place of minus infinity, would change the loss.
    """
    for pairs in run_ranks(measure_vocabulary, RANKS, chunk_size, smoothing):
        for name, (ours, expected) in pairs.items():
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
