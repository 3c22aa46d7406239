"""Tests packing: order, offsets, and streams without samples."""

import itertools

import numpy as np
import pytest
import torch

from beit3_ds.data.images.augmentation import Views
from beit3_ds.tasks.pretraining.packing import ImageSample, ImageShape, PairSample, Sample, TextSample, pack

SHAPE = ImageShape(image_size=4, tokenizer_image_size=6, num_patches=4)


def _image(mark: int, name: str = "image") -> ImageSample:
    mask = np.array([True, False, False, True])
    return ImageSample(
        name=name,
        views=Views(torch.full((3, 4, 4), mark), torch.full((3, 6, 6), mark), torch.full((3, 3), mark / 10)),
        patch_mask=mask,
    )


def _text(first: int, length: int, positions: list[int], name: str = "text") -> TextSample:
    ids = np.arange(first, first + length)
    return TextSample(
        name=name, ids=ids, masked_positions=np.array(positions), target_ids=ids[np.array(positions)] + 1000
    )


def test_captions_come_before_texts_and_positions_move_along() -> None:
    pairs = [
        PairSample(image=_image(2, "p"), caption=_text(100, 3, [1], "caption p")),
        PairSample(image=_image(3, "q"), caption=_text(200, 5, [2, 4], "caption q")),
    ]
    batch = pack([_image(1, "i"), *pairs, _text(300, 4, [3], "t")], torch.zeros(4, 2, 2), {}, SHAPE)
    assert (batch.num_images, batch.num_pairs, batch.caption_lengths, batch.text_lengths) == (1, 2, (3, 5), (4,))
    assert batch.pixels[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert batch.targets["tokenizer_pixels"][:, 0, 0, 0].tolist() == [1, 2, 3]
    torch.testing.assert_close(batch.colors[:, 0, 0], torch.tensor([0.1, 0.2, 0.3]))
    assert batch.token_ids.tolist() == [100, 101, 102, 200, 201, 202, 203, 204, 300, 301, 302, 303]
    # catches positions relative to the start of their own text
    assert batch.targets["masked_tokens"].tolist() == [1, 5, 7, 11]
    assert torch.equal(batch.token_ids[batch.targets["masked_tokens"]] + 1000, batch.targets["target_ids"])
    assert batch.sample_names == ("i", "p", "q", "t")
    assert batch.term_counts == (2, 1, 4, 3)


@pytest.mark.parametrize("present", itertools.product([0, 2], repeat=3))
def test_any_stream_may_be_absent(present: tuple[int, int, int]) -> None:
    images, pairs, texts = present
    samples: list[Sample] = [_image(1)] * images
    samples += [PairSample(image=_image(2), caption=_text(100, 3, [1]))] * pairs
    samples += [_text(300, 4, [3])] * texts
    batch = pack(samples, None, {}, SHAPE)
    num_pixels = images + pairs
    assert batch.num_sequences == sum(present)
    # shapes and dtypes must hold without samples too: every parameter takes part in every micro-batch
    assert batch.pixels.shape == (num_pixels, 3, 4, 4)
    views = batch.targets["tokenizer_pixels"]
    assert views.shape == (num_pixels, 3, 6, 6)
    assert (batch.patch_mask.shape, batch.patch_mask.dtype) == ((num_pixels, 4), torch.bool)
    for ids in (batch.token_ids, batch.targets["masked_tokens"], batch.targets["target_ids"]):
        assert ids.dtype == torch.int64
    assert batch.num_rows == images * 5 + pairs * 8 + texts * 4


def test_samples_in_another_order_are_refused() -> None:
    with pytest.raises(AssertionError, match="images, pairs, texts"):  # catches drop-path factors of other samples
        pack([_text(1, 3, [1]), _image(1)], None, {}, SHAPE)
