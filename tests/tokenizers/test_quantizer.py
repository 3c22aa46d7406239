"""Tests the codebook: its initialisation, moving averages, and the gradient that bypasses it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.tokenizers.quantizer import Quantizer

DECAY = 0.9


def unit_vectors(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def started_quantizer(codebook: Tensor) -> Quantizer:
    quantizer = Quantizer(*codebook.shape, ema_decay=DECAY)
    quantizer.weight.copy_(codebook)
    quantizer.started.fill_(True)
    return quantizer


def test_kmeans_start_finds_every_cluster() -> None:
    centers = torch.eye(32)
    noise = 0.003 * torch.randn(2000, 32, generator=torch.Generator().manual_seed(1))
    cluster = torch.arange(2000) % 32
    cluster[:1000] = 0  # half of the vectors are in one cluster, like white backgrounds
    quantizer = Quantizer(32, 32, DECAY)
    quantizer.start(F.normalize(centers[cluster] + noise, dim=-1))
    # Catches uniform draws, which start many codes in the large cluster and none in some of the others.
    assert sorted(quantizer.nearest(centers).tolist()) == list(range(32))
    torch.testing.assert_close(quantizer.weight.norm(dim=-1), torch.ones(32))


def test_start_survives_fewer_different_vectors_than_codes() -> None:
    quantizer = Quantizer(16, 4, DECAY)
    quantizer.start(unit_vectors(3, 4).repeat(10, 1))
    assert torch.isfinite(quantizer.weight).all()  # catches 0/0 when every distance has become zero


def test_update_equals_the_written_out_reference() -> None:
    codebook, vectors = unit_vectors(6, 4), unit_vectors(50, 4, seed=1)
    quantizer = started_quantizer(codebook).train()
    _, _, codes = quantizer(vectors)
    assert torch.equal(quantizer.weight, codebook)  # catches codes that move before the end of the step
    quantizer.move_codes()
    expected = codebook.clone()
    for code in range(6):
        mine = vectors[codes == code]
        if len(mine):
            mean = mine.sum(0) / mine.sum(0).norm()
            moved = DECAY * codebook[code] + (1 - DECAY) * mean
            expected[code] = moved / moved.norm()  # catches a code that leaves the unit sphere
    torch.testing.assert_close(quantizer.weight, expected)
    counts = torch.bincount(codes, minlength=6).float()
    torch.testing.assert_close(quantizer.cluster_size, (1 - DECAY) * counts)


def test_codes_are_those_of_largest_cosine() -> None:
    quantizer = started_quantizer(unit_vectors(6, 4)).eval()
    vectors = unit_vectors(2, 5, 4, seed=1)
    quantized, _, codes = quantizer(vectors)
    distances = (vectors[:, :, None] - quantizer.weight).square().sum(-1)
    assert torch.equal(codes, distances.argmin(-1))
    torch.testing.assert_close(quantized, quantizer.weight[codes])


def test_gradient_goes_straight_through() -> None:
    quantizer = started_quantizer(unit_vectors(6, 4)).eval()
    vectors = unit_vectors(5, 4, seed=1).requires_grad_()
    upstream = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    quantized, commitment, codes = quantizer(vectors)
    (through,) = torch.autograd.grad(quantized, vectors, upstream, retain_graph=True)
    torch.testing.assert_close(through, upstream)  # catches a missing detach: the gradient would be zero or doubled
    (pull,) = torch.autograd.grad(commitment.mean(), vectors)
    torch.testing.assert_close(pull, 2 * (vectors.detach() - quantizer.weight[codes]) / vectors.numel())


def test_dead_codes_keep_their_value() -> None:
    codebook = torch.tensor([[1.0, 0.0], [-0.6, 0.8], [0.6, -0.8]])
    quantizer = started_quantizer(codebook).train()
    for seed in range(20):
        quantizer(F.normalize(torch.tensor([1.0, 0.0]) + 0.1 * unit_vectors(30, 2, seed=seed), dim=-1))
        quantizer.move_codes()
    assert torch.equal(quantizer.weight[1:], codebook[1:])  # catches the pull of an empty mean, which is zero
    assert not torch.equal(quantizer.weight[0], codebook[0])


def test_evaluation_changes_nothing() -> None:
    quantizer = started_quantizer(unit_vectors(6, 4)).eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(unit_vectors(50, 4, seed=1))
    quantizer.move_codes()
    for name in ("weight", "started"):
        assert torch.equal(quantizer.state_dict()[name], before[name]), name  # catches learning from validation images


def test_rows_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = started_quantizer(unit_vectors(6, 4))
    vectors = unit_vectors(50, 4, seed=1)
    whole = quantizer.nearest(vectors)
    monkeypatch.setattr("beit3_ds.tokenizers.quantizer._CHUNK_ROWS", 7)
    assert torch.equal(quantizer.nearest(vectors), whole)  # catches a lost last part


def test_codes_do_not_depend_on_autocast() -> None:
    quantizer = started_quantizer(unit_vectors(600, 8)).eval()
    vectors = unit_vectors(2000, 8, seed=1)
    codes = quantizer.nearest(vectors)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.nearest(vectors), codes)  # catches similarities in bfloat16: near ties flip


@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_one_update_covers_all_parts_of_a_step(num_parts: int) -> None:
    whole, parts = (started_quantizer(unit_vectors(6, 4)).train() for _ in range(2))
    vectors = unit_vectors(50, 4, seed=1)
    whole(vectors)
    for part in vectors.chunk(num_parts):
        parts(part)
    parts(vectors[:0])  # a micro-batch without images
    for quantizer in (whole, parts):
        quantizer.move_codes()
        assert not quantizer.totals.any()  # catches vectors of a step that count in the next one, too
    torch.testing.assert_close(parts.weight, whole.weight)
    torch.testing.assert_close(parts.cluster_size, whole.cluster_size)


def test_a_cast_keeps_the_codebook_in_float32() -> None:
    quantizer = started_quantizer(unit_vectors(6, 4)).bfloat16()
    assert torch.equal(quantizer.weight, unit_vectors(6, 4)) and quantizer.totals.dtype == torch.float32
    assert quantizer.double().weight.dtype == torch.float32
