"""Tests how images are encoded as visual tokens, divided over ranks and in bf16."""

from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_ds.config import build_run_config
from beit3_ds.data.images.augmentation import CenterViews
from beit3_ds.data.samples import SampleKey
from beit3_ds.parallel import TensorParallel
from beit3_ds.pixels import to_floats
from beit3_ds.tasks.build import build_task
from beit3_ds.tasks.pretraining.encoding import CodeEncoder
from beit3_ds.tasks.visual_tokenizer.samples import open_views
from beit3_ds.tokenizers import load_visual_tokenizer
from tests.fixtures.tokenizers import VERSION_0_1
from tests.ranks import run_ranks
from tests.run_config import CONFIGS, small_run_mapping

FILE = VERSION_0_1 / "visual.safetensors"


def drawn_images(count: int) -> tuple[Tensor, Tensor]:
    """Returns random 8-bit images, (count, 3, 32, 32), and factors of colour jitter, (count, 3, 3)."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return pixels, torch.rand(count, 3, 3, generator=generator)


def encode_divided(counts: list[int]) -> list[tuple[Tensor, list[int]]]:
    """Encodes several batches on one of two ranks.

    Returns:
        For each batch, the codes and the numbers of images that this rank encoded.
    """
    import torch.distributed as dist

    dist.init_process_group("gloo")
    encoder = CodeEncoder(load_visual_tokenizer(FILE))
    encoder.start(TensorParallel(dist.group.WORLD, dist.get_rank(), 2), torch.device("cpu"))
    encode, seen = encoder.tokenizer.encode, []

    def note(pixels: Tensor, *rest: Any) -> Tensor:
        seen.append(len(pixels))
        return encode(pixels, *rest)

    encoder.tokenizer.encode = note  # type: ignore[method-assign]
    results = []
    for count in counts:
        codes = encoder.encode(*drawn_images(count))
        results.append((codes, seen.copy()))
        seen.clear()
    dist.destroy_process_group()
    return results


def test_each_rank_encodes_its_part_once() -> None:
    """Catches images in a wrong order, colours of another image, and ranks that encode all images."""
    counts, tokenizer = [5, 1, 0, 4], load_visual_tokenizer(FILE)
    first, second = run_ranks(encode_divided, 2, counts)
    for count, (codes, seen), (other, other_seen) in zip(counts, first, second, strict=True):
        assert torch.equal(codes, other)
        assert torch.equal(codes, tokenizer.encode(to_floats(*drawn_images(count)))) if count else len(codes) == 0
        assert seen + other_seen == {5: [3, 2], 1: [1], 0: [], 4: [2, 2]}[count]


def test_few_codes_differ_in_bf16() -> None:
    """Checks that bf16 changes few codes of 256 sample images: with this small tokenizer, 28 of 4,096 (0.7%).

    The limit leaves room for the rounding of other processors.
    """
    mapping = small_run_mapping(0, image_size=32, visual_vocab_size=32)
    mapping["beit3_ds"]["tokenizers"]["visual"] |= {"path": str(FILE), "image_size": 32, "codebook_size": 32}
    config, views = build_run_config(mapping), CenterViews(image_size=32, tokenizer_image_size=32)
    stream = open_views(config, config.data.images.train, views)
    pixels = torch.stack([stream.prepare(SampleKey(0, "images", 0, index)).pixels for index in range(256)])
    tokenizer = load_visual_tokenizer(FILE)
    exact, rounded = (CodeEncoder(tokenizer, dtype).encode(pixels) for dtype in (torch.float32, torch.bfloat16))
    share = (exact != rounded).double().mean().item()
    assert 0 < share <= 0.015  # catches an encoder that ignores the type, and a search for the nearest code in bf16


@pytest.mark.parametrize(("name", "factor"), [("base_8gpu", 9), ("quickstart_cpu", 1)])
def test_float32_costs_more_beside_a_model_in_bf16(name: str, factor: int) -> None:
    """Checks the predicted cost of a float32 tokenizer beside a model in bf16.

    The last stage adds the cost of the heads and of the tokenizer's encoder, each at the rate of its own dtype.
    """
    import json

    costs = []
    for dtype in ("float32", "bfloat16"):
        mapping = json.loads((CONFIGS / f"{name}.json").read_text())
        mapping["beit3_ds"]["tokenizers"]["visual"]["encoding_dtype"] = dtype
        config = build_run_config(mapping)
        task: Any = build_task(config)
        costs.append(task.expected_head_flops())
    fast = task._tokenizer_flops()
    assert fast > 0 and costs[0] - costs[1] == pytest.approx((factor - 1) * fast)
