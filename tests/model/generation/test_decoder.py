"""Compares predictions from cached keys and values with a full pass over image and caption."""

import pytest
import torch
from torch import Tensor

from beit3_ds.config import ModelConfig, ParallelConfig
from beit3_ds.model import TaskModel, initialize_parameters
from beit3_ds.model.features import pack_inputs
from beit3_ds.model.generation import CaptionDecoder
from beit3_ds.parallel import TensorParallel
from beit3_ds.tasks.captioning.head import CaptionHead
from tests.batches import decoupled, small_model_config
from tests.model.generation.captioners import random_captioner
from tests.ranks import run_ranks

CONFIGS = {
    "paper": small_model_config(),
    "sub-LN": small_model_config(sub_layernorm=True, num_vision_language_layers=0),
    "pairs": small_model_config(inputs=("pairs",), final_norm=False),
    "decoupled": decoupled(),
    "heads of four": small_model_config(num_attention_heads=4),
    "decoupled, heads of four": decoupled(num_attention_heads=4),
}
MASK = 49


def whole_pass(model: TaskModel, image: Tensor, ids: list[int]) -> Tensor:
    """Returns the log-probabilities of the next word after a caption, computed from all rows at once."""
    batch = pack_inputs(model.config, None, None, (image[None], [[*ids, MASK]]), torch.device("cpu"))
    object.__setattr__(batch, "causal_captions", True)
    h_TD = model.run_layers(batch)
    return model.heads.word_layer.logits(h_TD[-1:])[0].log_softmax(0)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_cached_equals_the_whole_pass(name: str) -> None:
    """Checks captions of several beams while beams are reordered and images are removed."""
    config: ModelConfig = CONFIGS[name]
    model, generator = random_captioner(config), torch.Generator().manual_seed(3)
    pixels = torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1
    decoder = CaptionDecoder(model, pixels, MASK)

    def draw(number: int) -> list[int]:
        return torch.randint(3, 49, (number,), generator=generator).tolist()

    images, captions = [0, 1, 2, 3], [[0]] * 4
    moves = [  # places of images, and the captions that are continued
        ([0, 1, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3]),
        ([0, 3, 2], [1, 1, 7, 6, 4, 5]),
        ([0, 1, 2], [1, 0, 3, 2, 5, 5]),
        ([2], [5, 4]),
        ([0], [1, 1]),
    ]
    for order, rows in moves:
        found = decoder.next_words(torch.tensor([caption[-1] for caption in captions]))
        beams = len(captions) // len(images)
        for row, caption in enumerate(captions):
            expected = whole_pass(model, pixels[images[row // beams]], caption)
            torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-5)
        decoder.drop_images(order)
        decoder.select(rows)
        images = [images[place] for place in order]
        words = draw(len(rows))
        captions = [[*captions[row], word] for row, word in zip(rows, words, strict=True)]


def predict_on_rank(name: str) -> Tensor:
    """Predicts two words with a model that is divided over tensor-parallel ranks."""
    from beit3_ds.runtime.process_group import init_process_group

    mesh = init_process_group(ParallelConfig(tensor_parallel_size=2, timeout_seconds=60))
    log_probs = predict_two_words(divided_captioner(CONFIGS[name], mesh.tensor))
    mesh.close()
    return log_probs


@torch.no_grad()
def divided_captioner(config: ModelConfig, tensor: TensorParallel) -> TaskModel:
    model = TaskModel(CaptionHead, config, tensor)
    initialize_parameters(model, config, seed=4)
    return model.eval()


@torch.no_grad()
def predict_two_words(model: TaskModel) -> Tensor:
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1
    decoder = CaptionDecoder(model, pixels, MASK)
    first = decoder.next_words(torch.zeros(2, dtype=torch.int64))
    decoder.select([1, 0, 1, 1])
    return torch.cat([first, decoder.next_words(torch.tensor([3, 4, 5, 6]))])


@pytest.mark.parametrize("name", ["heads of four", "decoupled, heads of four"])
def test_tensor_parallel_ranks_predict_the_same(name: str) -> None:
    expected = predict_two_words(divided_captioner(CONFIGS[name], TensorParallel()))
    for found in run_ranks(predict_on_rank, 2, name):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
