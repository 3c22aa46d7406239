"""Compares generated captions with the reference's, and checks that they do not depend on the batch."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from beit3_ds.config import ConfigError
from beit3_ds.model import TaskModel
from beit3_ds.model.generation import BeamSearch, Caption, CaptionDecoder, generate
from beit3_ds.tasks.captioning.head import CaptionHead
from tests.batches import decoupled, small_model_config
from tests.model.generation.captioners import random_captioner
from tests.weights.golden import import_golden, load_model, read_golden

TOKENS = SimpleNamespace(bos_id=0, eos_id=2, mask_id=63)
PADDING = 1
SEARCHES = [(1, 0.6, 12), (3, 0.6, 12), (3, 1.0, 8)]


@pytest.mark.parametrize(("beams", "penalty", "length"), SEARCHES)
def test_captions_are_the_references(
    beams: int, penalty: float, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = read_golden("captioning")
    model = load_model(import_golden(golden, tmp_path, monkeypatch))
    search = BeamSearch(num_beams=beams, length_penalty=penalty, max_length=length)
    expected = golden.outputs[f"beam{beams}_penalty{penalty}_length{length}"]
    captions = generate(model, golden.inputs["image"], TOKENS, search)
    assert [written(caption, length) for caption in captions] == expected.tolist()
    for image, caption in zip(golden.inputs["image"], captions, strict=True):
        assert generate(model, image[None], TOKENS, search)[0].ids == caption.ids


def written(caption: Caption, length: int) -> list[int]:
    """Returns ids in the reference's format: BOS, words, placeholder, EOS, padding."""
    ids = [TOKENS.bos_id, *caption.ids, TOKENS.mask_id, TOKENS.eos_id]
    return ids + [PADDING] * (length - len(ids))


MODELS = {
    "paper": (small_model_config(text_vocab_size=64), 5),
    "pairs": (small_model_config(text_vocab_size=64, inputs=("pairs",), sub_layernorm=True), 0),
    "decoupled": (decoupled(text_vocab_size=64), 1),
}
"""Configurations, each with a seed that gives captions of several lengths."""


@pytest.mark.parametrize("name", MODELS)
def test_the_batch_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares captions of seven images with those of each image alone, and counts the computed rows."""
    model, rows, next_words = random_captioner(*MODELS[name]), [], CaptionDecoder.next_words

    def counted(self: CaptionDecoder, ids: torch.Tensor) -> torch.Tensor:
        rows.append(len(ids))
        return next_words(self, ids)

    monkeypatch.setattr(CaptionDecoder, "next_words", counted)
    pixels = torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    search = BeamSearch(num_beams=2, max_length=9)
    together = generate(model, pixels, TOKENS, search)
    assert len({len(caption.ids) for caption in together}) > 2
    num_rows = sum(rows)
    for image, caption in zip(pixels, together, strict=True):
        (alone,) = generate(model, image[None], TOKENS, search)
        assert alone.ids == caption.ids and alone.score == pytest.approx(caption.score, abs=1e-5)
    assert sum(rows) == 2 * num_rows  # complete captions cost nothing
    assert generate(model, pixels[:0], TOKENS) == []


def test_what_cannot_write_captions_is_refused() -> None:
    model = random_captioner(*MODELS["paper"])
    pixels = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ConfigError, match=r"need 21 positions, but the model has max_text_length=20"):
        generate(model, pixels, TOKENS, BeamSearch(max_length=22))
    with pytest.raises(ConfigError, match=r"considers 66 words per step, but the vocabulary has 64"):
        generate(model, pixels, TOKENS, BeamSearch(num_beams=22))
    with pytest.raises(ConfigError, match="at least 1 beam and 4 ids"):
        BeamSearch(max_length=3)
    texts = TaskModel(CaptionHead, small_model_config(text_vocab_size=64, inputs=("texts",)))
    with pytest.raises(ConfigError, match=r"takes texts and predicts words.*with pairs among their inputs"):
        generate(texts, pixels, TOKENS)
