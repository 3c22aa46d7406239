"""Tests the model that a tokenizer run trains: its loss terms, gradients and codebook."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import VisualTokenizerConfig
from beit3_ds.tasks.visual_tokenizer.model import TokenizerModel
from beit3_ds.tasks.visual_tokenizer.packing import TEACHER_FEATURES, pack, with_teacher_features
from beit3_ds.tasks.visual_tokenizer.samples import TokenizerView

WIDTH, PATCHES = 11, 9
FACTORS = torch.tensor([1.0, 0.5])
SIZES = {"image_size": 24, "patch_size": 8, "hidden_size": 16, "num_layers": 2, "decoder_layers": 1}
SIZES |= {"num_attention_heads": 2, "codebook_size": 10, "codebook_dim": 4}


def build_model() -> TokenizerModel:
    """Returns a model in training mode whose codebook is initialised."""
    model = TokenizerModel(VisualTokenizerConfig(**SIZES), WIDTH, "")
    model.initialize(seed=1)
    model.center.copy_(torch.linspace(-1, 1, WIDTH))
    with torch.no_grad():
        model.quantize.start(model.project(draw_pixels(8, seed=9)).flatten(0, 1))
    model.is_quantized = True
    return model.train()


def draw_pixels(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 24, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def build_batch(count: int, seed: int = 0) -> PackedBatch:
    samples = [TokenizerView(str(number), pixels, None) for number, pixels in enumerate(draw_pixels(count, seed))]
    batch = pack(samples, None, {}, VisualTokenizerConfig(**SIZES))
    features = torch.randn(count, PATCHES, WIDTH, generator=torch.Generator().manual_seed(seed))
    return with_teacher_features(batch, features)


def test_terms_are_those_of_beit_v2() -> None:
    model, batch = build_model().eval(), build_batch(3)
    output = model(batch, FACTORS)
    assert batch.term_counts == (3 * PATCHES, 3 * PATCHES)
    vectors = model.project(batch.pixels)
    codes = model.encode(batch.pixels)
    quantized = model.quantize.weight[codes]
    reconstruction = model.decode(quantized)
    cosine = F.cosine_similarity(reconstruction, batch.targets[TEACHER_FEATURES] - model.center, dim=-1)
    means = output.sums / 27
    torch.testing.assert_close(means[0], 1 - cosine.mean())  # catches a mean of the features that is left in
    torch.testing.assert_close(means[1], F.mse_loss(vectors, quantized))
    torch.testing.assert_close(output.total, (output.sums * FACTORS).sum())
    assert torch.equal(model(batch, None), vectors)


def test_every_parameter_gets_a_gradient_in_both_phases_and_without_images() -> None:
    for is_quantized in (False, True):
        for count in (3, 0):
            model = build_model()
            model.is_quantized = is_quantized
            model(build_batch(count), torch.tensor([1.0, 0.0])).total.backward()
            for name, parameter in model.named_parameters():  # catches a cut between the two networks
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
                if count and not name.endswith(("cls_token", "qkv.bias")):
                    assert parameter.grad.any(), name


def test_parts_of_a_step_add_up() -> None:
    whole, parts = build_model(), build_model()
    batch = build_batch(5)
    whole(batch, FACTORS).total.backward()
    sums = torch.zeros(2)
    for chosen in (range(0, 2), range(2, 5), range(0)):
        part = dataclasses.replace(build_batch(len(chosen)), pixels=batch.pixels[list(chosen)])
        part = with_teacher_features(part, batch.targets[TEACHER_FEATURES][list(chosen)])
        output = parts(part, FACTORS)
        output.total.backward()
        sums += output.sums
    torch.testing.assert_close(sums, whole.eval()(batch, FACTORS).sums)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(parts.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.quantize.totals, whole.quantize.totals)


def test_recomputed_blocks_count_vectors_once() -> None:
    plain, recomputed = build_model(), build_model()
    recomputed.recompute_blocks()
    for model in (plain, recomputed):
        model(build_batch(3), FACTORS).total.backward()
    assert torch.equal(recomputed.quantize.totals, plain.quantize.totals)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(recomputed.get_parameter(name).grad, parameter.grad)


def test_bfloat16_keeps_codebook_and_vectors_in_float32() -> None:
    model = build_model().bfloat16()
    output = model(build_batch(3), FACTORS)
    output.total.backward()
    assert {model.center.dtype, model.quantize.weight.dtype, output.sums.dtype} == {torch.float32}
    vectors = model.project(draw_pixels(2))
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2, PATCHES))


def test_initial_values_depend_on_the_seed_alone() -> None:
    torch.manual_seed(7)
    first = build_model().state_dict()
    torch.manual_seed(8)  # catches draws from the caller's random state
    assert all(torch.equal(value, first[name]) for name, value in build_model().state_dict().items())
