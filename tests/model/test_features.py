"""Tests the features of images, texts and pairs, and the errors for invalid inputs."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.config import ConfigError
from beit3_ds.model import Features
from tests.batches import decoupled, random_batch, small_model_config
from tests.weights.models import random_inputs, random_model

LAYOUTS = {"paper": small_model_config(sub_layernorm=True), "decoupled": decoupled()}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_features_are_what_the_heads_see(layout: str) -> None:
    """Compares logits computed from features with the logits of the heads in training, at equal rows."""
    config = LAYOUTS[layout]
    model, batch = random_model(config), random_batch(config, 2, 2, 2)
    plain = dataclasses.replace(batch, patch_mask=torch.zeros_like(batch.patch_mask))  # keeps the corrupted ids
    logits = model.heads(model.run_layers(plain), batch, with_loss=False)
    ids = batch.token_ids.split([*batch.caption_lengths, *batch.text_lengths])
    features = model.encode(batch.pixels[:2], ids[2:], (batch.pixels[2:], ids[:2]))
    patches = torch.cat([features.images, features.pair_images])[:, 1:][batch.patch_mask]
    tokens = torch.cat([*features.pair_texts, *features.texts])[batch.targets["masked_tokens"]]
    torch.testing.assert_close((model.heads.mim.logits(patches), model.heads.mlm.logits(tokens)), logits)
    assert min(len(patches), len(tokens)) > 5


@settings(max_examples=40, deadline=None)
@given(
    num_images=st.integers(0, 3),
    texts=st.lists(st.integers(1, 20), max_size=3),
    captions=st.lists(st.integers(1, 20), max_size=3),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
@torch.no_grad()
def test_samples_have_the_same_features_alone(
    num_images: int, texts: list[int], captions: list[int], layout: str
) -> None:
    model = random_model(LAYOUTS[layout])
    images, ids, (pair_images, caption_ids) = random_inputs(model.config, num_images, texts, captions)
    if not num_images + len(texts) + len(captions):
        with pytest.raises(ConfigError, match="nothing to encode"):
            model.encode(images, ids, (pair_images, caption_ids))
        return
    packed = model.encode(images, ids, (pair_images, caption_ids))
    alone = Features(
        torch.cat([packed.images[:0], *(model.encode(images[i : i + 1]).images for i in range(num_images))]),
        tuple(model.encode(texts=[text]).texts[0] for text in ids),
        torch.cat(
            [packed.pair_images[:0]]
            + [model.encode(pairs=(pair_images[i : i + 1], [text])).pair_images for i, text in enumerate(caption_ids)]
        ),
        tuple(model.encode(pairs=(pair_images[i : i + 1], [text])).pair_texts[0] for i, text in enumerate(caption_ids)),
    )
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    length, width = 1 + model.config.num_patches, model.config.hidden_size
    assert packed.images.shape == (num_images, length, width)
    assert packed.pair_images.shape == (len(captions), length, width)
    assert [len(text) for text in packed.texts] == texts and [len(text) for text in packed.pair_texts] == captions


def test_one_can_train_through_features() -> None:
    model = random_model(LAYOUTS["paper"])
    images, texts, pairs = random_inputs(model.config)
    features = model.encode(images.requires_grad_(), [ids.tolist() for ids in texts], pairs)
    (features.images.sum() + features.pair_texts[0].sum()).backward()
    assert images.grad.abs().sum() > 0 and model.blocks["2"].ffn.fc1.weight_vision_language.grad.abs().sum() > 0


def test_inputs_that_do_not_fit_are_refused() -> None:
    model = random_model(small_model_config())
    images, _, (pair_images, captions) = random_inputs(model.config)
    for inputs, message in (
        ({"images": images[..., :-1]}, r"shape \(2, 3, 16, 15\).*image_size=PIXELS"),
        ({"images": images[0]}, r"shape \(3, 16, 16\)"),
        ({"images": (images * 127).to(torch.uint8)}, r"floats in \[-1, 1\]"),
        ({"texts": [[0] * 21]}, "max_text_length=20"),
        ({"texts": [[0, 2], []]}, "text 1"),
        ({"texts": [[0, 50, 2]]}, r"ids from 0 to 50.*\[0, 50\)"),
        ({"texts": [[-1, 2]]}, "ids from -1"),
        ({"texts": [[0.5, 2.0]]}, "float32"),
        ({"texts": [[[0, 2]]]}, r"shape \(1, 2\)"),
        ({"pairs": (pair_images, [*captions, [0, 2]])}, "1 images and 2 captions"),
        ({"pairs": (pair_images[..., 1:, :], captions)}, "pairs: pixels"),
        ({"pairs": (pair_images, [[0, 99]])}, "caption 0"),
        # Without checks these end in an error of torch or Python, or in meaningless features.
        ({"images": "photo.jpg"}, r"images: str 'photo\.jpg', but pixels are a tensor .*preprocess"),
        ({"images": [images[0], images[1]]}, r"images: list .*torch\.stack"),
        ({"images": images.numpy()}, r"images: ndarray "),
        ({"images": images[0]}, r"One image is images\[None\]"),
        ({"images": images * 127}, r"images: pixels from -1\d\d.* to 1\d\d"),
        ({"images": images * float("nan")}, "from nan"),
        ({"texts": "a dog"}, r"texts: str 'a dog'\. .*tokenizer\.encode\(text\)"),
        ({"texts": ["a dog"]}, r"text 0: str 'a dog', but a text is a list of token ids.*tokenizer\.encode"),
        ({"texts": [0, 5, 2]}, r"text 0: the number 0.* \[ids\]"),
        ({"texts": torch.tensor([0, 5, 2])}, r"text 0: the number .*\[ids\]"),
        ({"texts": torch.tensor(3)}, "texts: a single number"),
        ({"texts": 5}, "texts: int 5"),
        ({"texts": [["a", "dog"]]}, r"text 0: list \['a', 'dog'\]"),
        ({"texts": [[[0, 1], [2]]]}, "text 0: list"),
        ({"texts": [[1 << 70]]}, "text 0: list"),
        ({"texts": [[True, False]]}, r"text 0: torch\.bool"),
        ({"texts": [None]}, "text 0: NoneType"),
        ({"texts": [torch.zeros(3)]}, r"text 0: torch\.float32 of shape \(3,\)"),
        ({"pairs": pair_images}, r"pairs: Tensor .*Give \(images, captions\)"),
        ({"pairs": (pair_images,)}, r"pairs: tuple .*Give \(images, captions\)"),
        ({"pairs": (pair_images, None)}, r"pairs: tuple .*Give \(images, captions\)"),
        ({"pairs": (pair_images, "a dog")}, "pairs, captions: str 'a dog'"),
        ({"pairs": ("photo.jpg", captions)}, "pairs: str 'photo"),
        ({"images": images.to_sparse()}, r"images: a torch\.sparse_coo tensor"),
        ({"images": images.to("meta")}, "images: a .* tensor on meta"),
        ({"images": images.to(torch.float8_e4m3fn)}, r"images: pixels are torch\.float8"),
        ({"texts": [torch.tensor([0, 2]).to_sparse()]}, r"text 0: a torch\.sparse_coo tensor"),
        ({"texts": [np.array([0, 50], dtype=np.uint16)]}, r"ids from 0 to 50.*\[0, 50\)"),
        ({"texts": []}, "nothing to encode"),
        ({}, "nothing to encode"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.encode(**inputs)


def test_ids_of_every_integer_type_are_taken() -> None:
    model = random_model(small_model_config())
    expected = model.encode(texts=[[0, 5, 2], [0, 7, 2]]).texts
    ids = torch.tensor([[0, 5, 2], [0, 7, 2]])
    for texts in (ids, list(ids.int()), ids.numpy(), tuple(ids.to(torch.uint8)), [ids[0].tolist(), ids[1].numpy()]):
        torch.testing.assert_close(model.encode(texts=texts).texts, expected)
    for dtype in (np.uint16, np.uint32, np.uint64):  # torch cannot compare these dtypes; token files have the first one
        texts = [row.numpy().astype(dtype) for row in ids]
        torch.testing.assert_close(model.encode(texts=texts).texts, expected)
