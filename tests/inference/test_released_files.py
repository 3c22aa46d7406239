"""Tests the reference's fine-tuned files without an import; results must equal those of the reference."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from beit3_ds.inference import Captioner, DualEncoder, ImageClassifier, QuestionAnswerer, StatementJudge, VisionEncoder
from beit3_ds.model.generation import BeamSearch
from beit3_ds.tokenizers import TextTokenizer
from beit3_ds.weights import unilm_names
from tests.weights.golden import HEAD_SIZE, Golden, read_golden


class NumberTokenizer(TextTokenizer):
    """Reads a text as a list of token ids written as numbers."""

    def __init__(self) -> None:
        self.mask_id, self.vocab_size = 63, 64

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, ids))


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(unilm_names, "_HEAD_SIZE", HEAD_SIZE)

    def write(name: str) -> tuple[Golden, Path]:
        golden, path = read_golden(name), tmp_path / f"{name}.pth"
        torch.save({"model": golden.weights}, path)
        return golden, path

    return write


def texts_of(golden: Golden) -> list[str]:
    """Returns the texts without BOS and EOS, as numbers separated by spaces."""
    return [" ".join(map(str, ids[1:-1].tolist())) for ids in golden.texts()]


def test_questions(released, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    golden, path = released("vqav2")
    answers = [f"answer{i}" for i in range(11)]
    (tmp_path / "answers.txt").write_text(
        "".join(f'{{"answer": "{a}", "label": {i}}}\n' for i, a in enumerate(answers))
    )
    answerer = QuestionAnswerer.from_pretrained(path, NumberTokenizer(), tmp_path / "answers.txt")
    found = answerer(list(golden.inputs["image"]), texts_of(golden), top=11)
    for best, logits in zip(found, golden.outputs["logits"], strict=True):
        scores = {answer.text: answer.score for answer in best}
        assert [scores[a] for a in answers] == pytest.approx(logits.sigmoid().tolist(), abs=1e-5)
    assert answerer.model.config.inputs == ("pairs",) and not answerer.model.config.final_norm


def test_statements(released) -> None:  # type: ignore[no-untyped-def]
    golden, path = released("nlvr2")
    judge = StatementJudge.from_pretrained(path, NumberTokenizer())
    found = judge(list(golden.inputs["image"]), list(golden.inputs["image2"]), texts_of(golden))
    torch.testing.assert_close(found, golden.outputs["logits"].softmax(1)[:, 1], rtol=1e-5, atol=1e-5)


def test_captions(released) -> None:  # type: ignore[no-untyped-def]
    golden, path = released("captioning")
    captioner = Captioner.from_pretrained(path, NumberTokenizer())
    for beams, penalty, length in [(1, 0.6, 12), (3, 0.6, 12), (3, 1.0, 8)]:
        search = BeamSearch(num_beams=beams, length_penalty=penalty, max_length=length)
        ids = golden.outputs[f"beam{beams}_penalty{penalty}_length{length}"].tolist()
        words = [caption[1 : caption.index(2, 1) - 1] for caption in ids]  # up to the placeholder before EOS
        assert captioner(list(golden.inputs["image"]), search) == [" ".join(map(str, row)) for row in words]


def test_retrieval(released) -> None:  # type: ignore[no-untyped-def]
    golden, path = released("retrieval")
    dual = DualEncoder.from_pretrained(path, NumberTokenizer())
    images, texts = dual.encode_images(list(golden.inputs["image"])), dual.encode_texts(texts_of(golden))
    torch.testing.assert_close(images, golden.outputs["image_features"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(texts, golden.outputs["text_features"], rtol=1e-5, atol=1e-5)
    assert dual.scale == pytest.approx(1 / 0.07, rel=1e-5)


def test_classes(released) -> None:  # type: ignore[no-untyped-def]
    """Checks a classifier that reads only the A half of a decoupled file."""
    golden, path = released("imagenet_linear")
    classifier = ImageClassifier.from_pretrained(path, [str(i) for i in range(7)])
    found = classifier.probabilities(list(golden.inputs["image"]))
    torch.testing.assert_close(found, golden.outputs["logits"].softmax(1), rtol=1e-5, atol=1e-5)
    names = [name for name, _ in VisionEncoder.from_pretrained(path).model.named_parameters()]
    assert not [name for name in names if "language" in name or "word" in name]
