"""Tests that images and captions are packed separately, each with its own draws of stochastic depth."""

import numpy as np
import torch

from beit3_ds.tasks.retrieval.contrastive import IMAGE_IDS, TEXT_IDS
from beit3_ds.tasks.retrieval.packing import CAPTION_KEYS, IMAGE_INDICES, MAX_CAPTIONS, pack
from beit3_ds.tasks.retrieval.samples import RetrievalSample
from tests.batches import small_model_config

MODEL = small_model_config()


def build_sample(number: int, lengths: tuple[int, ...]) -> RetrievalSample:
    return RetrievalSample(
        name=f"image {number}",
        sample_index=number,
        view=torch.full((3, 16, 16), float(number)),
        texts=tuple(np.full(length, 10 * number + length) for length in lengths),
        image_id=-number,
        text_ids=tuple(100 * number + length for length in lengths),
    )


def test_rows_and_draws_belong_to_their_sequences() -> None:
    drop_path = torch.arange(4.0)[:, None, None].expand(4, 3, 2)  # image and caption of 5, image and caption of 7
    batch = pack([build_sample(5, (4,)), build_sample(7, (3,))], drop_path, {}, MODEL, embeds=True)
    assert batch.drop_path is not None and batch.drop_path[:, 0, 0].tolist() == [0, 2, 1, 3]
    assert batch.num_images == 2 and batch.num_pairs == 0 and batch.text_lengths == (4, 3)
    assert batch.head_rows is not None and batch.head_rows.tolist() == [0, 17, 34, 38]
    assert batch.head_row_counts == (2, 0, 0, 2) and batch.term_counts == (2, 2, 2, 2)
    assert batch.token_ids.tolist() == [54] * 4 + [73] * 3
    assert batch.pixels is not None and batch.pixels[:, 0, 0, 0].tolist() == [5, 7]
    assert batch.sample_names == ("image 5", "image 7", "image 5", "image 7")
    assert batch.targets[IMAGE_IDS].tolist() == [-5, -7] and batch.targets[TEXT_IDS].tolist() == [504, 703]


def test_an_evaluation_has_all_captions_of_an_image() -> None:
    batch = pack([build_sample(5, (4, 3)), build_sample(7, (3,))], None, {"pairs": 0}, MODEL, embeds=False)
    assert batch.pixels is None and batch.head_row_counts == (2, 0, 0, 3)
    assert batch.targets[IMAGE_INDICES].tolist() == [5, 7]
    assert batch.targets[CAPTION_KEYS].tolist() == [5 * MAX_CAPTIONS, 5 * MAX_CAPTIONS + 1, 7 * MAX_CAPTIONS]


def test_a_batch_may_be_empty() -> None:
    batch = pack([], torch.empty(0, 3, 2), {}, MODEL, embeds=True)
    assert batch.num_rows == 0 and batch.term_counts == (0,) * 4 and batch.pixels is not None
