"""Tests the losses and gradients of the detection head.

They must not depend on how a step is divided, and every parameter must get a gradient.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from beit3_ds.config import ModelConfig, ParallelConfig
from beit3_ds.config.dense import DenseConfig
from beit3_ds.model import LossOutput, TaskModel
from beit3_ds.parallel import TensorParallel, own_part
from beit3_ds.tasks.detection.box_masks import MASK_SIDE
from beit3_ds.tasks.detection.config import DetectionConfig
from beit3_ds.tasks.detection.flops import image_flops
from beit3_ds.tasks.detection.head import DetectionHead
from beit3_ds.tasks.detection.objects import COUNTS, ImageObjects
from beit3_ds.tasks.detection.packing import pack
from beit3_ds.tasks.detection.samples import DetectionSample
from beit3_ds.tasks.detection.views import View
from tests.gradient_order import gradient_order
from tests.ranks import run_ranks

MODEL = ModelConfig(
    num_layers=1,
    hidden_size=16,
    ffn_hidden_size=16,
    num_attention_heads=2,
    patch_size=16,
    image_size=96,
    num_vision_language_layers=0,
    inputs=("images",),
    dense=DenseConfig(window_size=3),
)
SETTINGS = DetectionConfig(
    num_classes=4, pyramid_channels=8, box_width=16, anchor_scale=4.0, proposals_per_level=60, proposals=40
)
NUM_TERMS = 5


@pytest.fixture
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _model(seed: int = 1, settings: DetectionConfig = SETTINGS) -> TaskModel:
    model = TaskModel(lambda config, tensor: DetectionHead(config, settings, 4, tensor), MODEL)
    model.initialize(seed)
    return model.to(torch.get_default_dtype())


def _sample(number: int, size: tuple[int, int], num_objects: int) -> DetectionSample:
    draws = torch.Generator().manual_seed(number)
    height, width = size
    limits = torch.tensor([width, height])
    corners = torch.rand(num_objects, 2, generator=draws) * limits * 0.5
    boxes = torch.cat([corners, torch.minimum(corners + 8 + 0.4 * limits, limits)], 1).float()
    disk = torch.linspace(-1, 1, MASK_SIDE) ** 2
    masks = (disk[:, None] + disk < 0.9).to(torch.uint8).expand(num_objects, -1, -1)
    labels = torch.randint(0, 4, (num_objects,), generator=draws)
    pixels = torch.randn(3, height, width, generator=draws)
    return DetectionSample(
        name=f"image {number}",
        sample_index=number,
        pixels=[pixels],
        seed=99 + number,
        objects=ImageObjects(boxes, labels, masks),
    )


SAMPLES = [_sample(0, (96, 96), 3), _sample(1, (80, 50), 2), _sample(2, (33, 96), 0), _sample(3, (16, 20), 1)]


def _output(model: TaskModel, part: Sequence[DetectionSample]) -> LossOutput:
    batch = pack(part, None, {}, model=MODEL, num_terms=NUM_TERMS, embeds=True)
    output: LossOutput = model(batch, torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0]))
    return output


def _run(model: TaskModel, parts: Sequence[Sequence[DetectionSample]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the sums of loss terms and gradients over micro-batches."""
    model.zero_grad()
    sums = torch.zeros(NUM_TERMS)
    for part in parts:
        output = _output(model, part)
        output.total.backward()
        sums += output.sums
    return sums, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


CUTS = {
    "two and two": [SAMPLES[:2], SAMPLES[2:]],
    "one by one": [[sample] for sample in SAMPLES],
    "another order": [SAMPLES[::-1]],
    "with an empty micro-batch": [SAMPLES, []],
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_step_is_the_same_however_it_is_cut(cut: str, double_precision: None) -> None:
    model = _model()
    sums, gradients = _run(model, [SAMPLES])
    found, other = _run(model, CUTS[cut])
    # Catches draws that depend on the place in a batch, losses divided by the boxes of a batch, anchors and features
    # beyond the edge of an image. Only float32 inside RoIAlign and of the losses remains.
    torch.testing.assert_close(found, sums, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        assert (other[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def _compare_tensor_parallel(sequence_parallel: bool) -> dict[str, tuple[float, float]]:
    """Runs one of two ranks in float64; returns, per gradient, the difference to one process and the norm."""
    from beit3_ds.runtime.process_group import init_process_group

    mesh = init_process_group(ParallelConfig(tensor_parallel_size=2, sequence_parallel=sequence_parallel))
    torch.set_default_dtype(torch.float64)
    dense = DenseConfig(window_size=3, global_blocks=(1,), relative_positions=True)
    config = dataclasses.replace(MODEL, num_layers=2, sub_layernorm=True, dense=dense)
    drop_path = torch.tensor([[[1.0, 2.0], [0.0, 1.5]]]).repeat(3, 1, 1)
    # The ranks take 1 and 2 images. Both maps have the full size, because float32 RoIAlign rounds with the size.
    samples = [*SAMPLES[:2], _sample(4, (96, 96), 2)]
    batch = pack(samples, drop_path, {}, model=config, num_terms=NUM_TERMS, embeds=True)
    models = []
    for tensor in (TensorParallel(), mesh.tensor):
        model = TaskModel(lambda config, tensor: DetectionHead(config, SETTINGS, 4, tensor), config, tensor)
        model.initialize(1)
        models.append(model.double())
        models[-1](batch, torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0])).total.backward()
    norms = {}
    for (name, whole), own in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        expected = own_part(own, whole.grad)
        norms[name] = (own.grad - expected).norm().item(), expected.norm().item()
    return norms


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_gradients_equal_one_process(sequence_parallel: bool) -> None:
    """Catches gradients summed twice or not at all, a scaled residual stream, and random draws that depend on the rank.

    Trunk and head run in float64, where they agree to 1e-14, so rounding cannot hide a mistake. Losses and RoIAlign run
    in float32 but get equal inputs on both sides. The gradient of the key bias is 0 except for rounding.
    """
    for norms in run_ranks(_compare_tensor_parallel, 2, sequence_parallel):
        smallest = 1e-6 * max(norm for _, norm in norms.values())
        assert len(norms) > 100
        for name, (difference, norm) in norms.items():
            assert difference <= 1e-9 * max(norm, smallest), f"{name}: {difference:.2e} of {norm:.2e}"


def test_every_parameter_takes_part_in_every_micro_batch() -> None:
    model = _model()
    for part in ([], [SAMPLES[2]]):
        sums, gradients = _run(model, [part])  # no image; an image without objects
        assert sums.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients.values())
        assert len(gradients) == len(list(model.parameters()))
    assert sums[1] == 0 and sums[3] == 0 and sums[4] == 0 and sums[0] > 0


def test_the_order_of_gradients_does_not_depend_on_the_images() -> None:
    model = _model()
    orders = [
        gradient_order(model, lambda part=part: _output(model, part).total) for part in ([], [SAMPLES[2]], SAMPLES)
    ]
    assert len(orders[0]) == len(list(model.parameters())) and orders[0] == orders[1] == orders[2]


def test_the_number_of_outputs_of_a_module_does_not_depend_on_the_images() -> None:
    """Catches an output per image: ZeRO-3 runs a hook per output, and data-parallel ranks must run the same hooks."""
    model = _model()
    counts: list[tuple[str, int]] = []
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: counts.append((name, len(tree_leaves(output))))
        )
    found = []
    for part in ([], [SAMPLES[2]], SAMPLES):
        counts.clear()
        _output(model, part)
        found.append(tuple(counts))
    assert found[0] and found[0] == found[1] == found[2]


def test_it_fits_one_image() -> None:
    """Checks that a few updates on one image lower every loss term, and more than halve the sum of object terms."""
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    first, _ = _run(model, [[SAMPLES[0]]])
    for _ in range(25):
        last, _ = _run(model, [[SAMPLES[0]]])
        optimizer.step()
    assert (last[[0, 2, 4]] < first[[0, 2, 4]]).all() and last[[0, 2, 4]].sum() < 0.5 * first[[0, 2, 4]].sum()


def test_detections_are_in_pixels_of_the_image_and_views_are_merged() -> None:
    model = _model().eval()
    image = torch.randn(3, 96, 64)
    single = DetectionSample(name="a", sample_index=4, pixels=[image], views=[View(0, (96, 64), (192, 128), False)])
    views = [View(0, (96, 64), (192, 128), False), View(0, (96, 64), (192, 128), True)]
    flipped = DetectionSample(name="b", sample_index=5, pixels=[image, image.flip(-1)], views=views)
    batch = pack([single, flipped], None, {}, model=MODEL, num_terms=NUM_TERMS, embeds=True)
    with torch.no_grad():
        one, two = model(batch, None)
    for found in (one, two):
        assert len(found.boxes) == SETTINGS.max_detections and found.masks is not None
        assert found.masks.shape == (len(found.boxes), 28, 28)
        assert (found.boxes >= 0).all() and (found.boxes <= torch.tensor([128, 192, 128, 192])).all()
        assert (found.scores.diff() <= 0).all()
    with torch.no_grad():
        assert model(pack([], None, {}, model=MODEL, num_terms=NUM_TERMS, embeds=True), None) == []


def test_stages_compare_numbers_that_stay_on_the_host() -> None:
    batch = pack(SAMPLES, None, {}, model=MODEL, num_terms=NUM_TERMS, embeds=True)
    counts = {COUNTS: batch.host_targets[COUNTS] + 1}
    other = dataclasses.replace(batch, host_targets={**batch.host_targets, **counts})
    assert batch.fingerprint() != other.fingerprint() and not batch.without_pixels().host_targets


def test_views_map_boxes_there_and_back() -> None:
    boxes = torch.tensor([[10.0, 20.0, 50.0, 90.0]])
    view = View(0, (48, 32), (192, 128), True)
    assert view.to_image(torch.tensor([[2.0, 4.0, 10.0, 12.0]])).tolist() == [[88.0, 16.0, 120.0, 48.0]]
    torch.testing.assert_close(view.to_image(view.from_image(boxes)), boxes)


def test_operations_are_those_that_torch_counts() -> None:
    """Checks the head's operation count, by which pipeline stages are cut; beside a small trunk the head is large."""
    settings = dataclasses.replace(
        SETTINGS, pyramid_channels=16, sampled_boxes=8, proposals=200, proposals_per_level=200
    )
    head = DetectionHead(MODEL, settings, 4)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05)
    batch = pack([SAMPLES[0]], None, {}, model=MODEL, num_terms=NUM_TERMS, embeds=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        head(torch.randn(36, MODEL.hidden_size), batch, True)
    # Fewer boxes may be positive than a quarter.
    assert image_flops(MODEL, settings) == pytest.approx(counter.get_total_flops(), rel=0.15)
