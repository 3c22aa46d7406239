"""Runs every use of `beit3 predict` and compares its JSON with the classes of `beit3_ds.inference`."""

import json
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.cli.main import main
from beit3_ds.inference import Captioner, DualEncoder, QuestionAnswerer, StatementJudge
from tests.inference.weights import ANSWERS, TEXTS, draw_photo, write_task_weights


@pytest.fixture
def spm(tokenizer_files: dict[str, str]) -> str:
    return tokenizer_files["text"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder of three images and one file that is not an image."""
    (tmp_path / "photos").mkdir()
    for seed in range(3):
        draw_photo(tmp_path / "photos" / f"{seed}.png", seed)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def predict(tmp_path: Path, *arguments: object) -> list[dict[str, Any]]:
    """Runs a command and returns its JSON; checks that the HTML page has no links to other files."""
    out, page = tmp_path / "out.json", tmp_path / "page.html"
    assert main(["predict", *map(str, arguments), "--out", str(out), "--page", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "data:image/jpeg;base64" in text and "http" not in text
    return json.loads(out.read_text(encoding="utf-8"))


def test_captions_of_a_folder(folder: Path, spm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_task_weights(tmp_path / "w", "captioning")
    photos = sorted(folder.glob("*.png"))
    found = predict(tmp_path, "caption", tmp_path / "w", folder, "--tokenizer", spm)
    captions = Captioner.from_pretrained(tmp_path / "w", spm)(photos)
    assert found == [{"image": str(p), "caption": c} for p, c in zip(photos, captions, strict=True)]
    capsys.readouterr()
    assert main(["predict", "caption", str(tmp_path / "w"), str(photos[0]), "--tokenizer", spm]) == 0
    assert json.loads(capsys.readouterr().out) == found[:1]


def test_one_question_and_a_file_of_questions(folder: Path, spm: str, tmp_path: Path) -> None:
    write_task_weights(tmp_path / "w", "vqa", {"answers": ANSWERS})
    one = ["answer", tmp_path / "w", "--tokenizer", spm, "--image", folder / "0.png", "--question", TEXTS[0]]
    (alone,) = predict(tmp_path, *one)
    ((best, *_),) = QuestionAnswerer.from_pretrained(tmp_path / "w", spm)(folder / "0.png", TEXTS[0])
    assert alone["answer"] == best.text and alone["answers"][0]["score"] == pytest.approx(best.score, abs=1e-5)
    assert len(alone["answers"]) == 3 and "id" not in alone
    lines = [{"id": 7, "image": "0.png", "question": TEXTS[0]}, {"image": "1.png", "question": TEXTS[1]}]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    several = ["answer", tmp_path / "w", "--tokenizer", spm, "--file", tmp_path / "questions.jsonl", "--images", folder]
    first, second = predict(tmp_path, *several, "--top", "2")
    assert first["id"] == 7 and first["answers"] == alone["answers"][:2] and second["question"] == TEXTS[1]


def test_a_folder_against_texts(folder: Path, spm: str, tmp_path: Path) -> None:
    write_task_weights(tmp_path / "w", "retrieval")
    (tmp_path / "texts.txt").write_text(f"{TEXTS[1]}\n\n")
    options = ["--tokenizer", spm, "--text", TEXTS[0], "--texts", tmp_path / "texts.txt", "--top", "2"]
    found = predict(tmp_path, "match", tmp_path / "w", folder, *options)
    dual, photos = DualEncoder.from_pretrained(tmp_path / "w", spm), sorted(folder.glob("*.png"))
    cosines = dual.encode_texts(TEXTS) @ dual.encode_images(photos).T
    for text, entry, row in zip(TEXTS, found, cosines, strict=True):
        assert entry["text"] == text
        assert [image["image"] for image in entry["images"]] == [str(photos[i]) for i in row.topk(2).indices]


def test_statements_and_classes(folder: Path, spm: str, tmp_path: Path) -> None:
    write_task_weights(tmp_path / "nlvr2", "nlvr2")
    images = [folder / "0.png", folder / "1.png"]
    (found,) = predict(tmp_path, "judge", tmp_path / "nlvr2", *images, TEXTS[0], "--tokenizer", spm)
    expected = float(StatementJudge.from_pretrained(tmp_path / "nlvr2", spm)(*images, TEXTS[0])[0])
    assert found["probability"] == pytest.approx(expected, abs=1e-5) and found["is_true"] == (expected > 0.5)
    write_task_weights(tmp_path / "linear", "imagenet", {"head": "linear"})
    (tmp_path / "names.txt").write_text("tench\ncrane\ncrane\n")
    found = predict(tmp_path, "classify", tmp_path / "linear", folder, "--names", tmp_path / "names.txt", "--top", "1")
    assert len(found) == 3 and found[0]["classes"][0]["class"] in ("tench", "crane")


def test_mistakes_are_named(folder: Path, spm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checks that mistakes are reported before a model is loaded; the weights do not exist."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "twice.jsonl").write_text('{"id": 1, "image": "photos/0.png", "question": "what?"}\n' * 2)
    (tmp_path / "lost.jsonl").write_text('\n{"image": "photos/9.png", "question": "what?"}')
    (tmp_path / "blank.jsonl").write_text('{"image": "photos/0.png", "question": " "}')
    broken = folder / "broken.png"
    broken.write_bytes((folder / "0.png").read_bytes()[:60])
    write_task_weights(tmp_path / "w", "captioning")
    spm_option = ["--tokenizer", spm]
    for arguments, message in [
        (["caption", "none", "nowhere.png", *spm_option], "there is no image nowhere.png"),
        (["caption", "none", tmp_path / "empty", *spm_option], "holds no images (.jpg"),
        (["caption", "none", folder / "0.png", *spm_option], "there is no none"),
        (["caption", tmp_path / "w", broken, *spm_option], "broken.png: "),
        (["caption", tmp_path / "w", folder / "0.png", *spm_option, "--device", "mars"], "--device mars: "),
        (["caption", tmp_path / "w", folder / "0.png", *spm_option, "--out", "none/a.json"], "there is no folder none"),
        (["answer", "none", "--image", folder / "0.png", *spm_option], "give either --image and --question, or --file"),
        (
            ["answer", "none", "--file", tmp_path / "twice.jsonl", *spm_option],
            "twice.jsonl:2: the id 1 occurs in line 1",
        ),
        (["answer", "none", "--file", tmp_path / "lost.jsonl", *spm_option], "lost.jsonl:2: there is no image"),
        (["answer", "none", "--file", tmp_path / "blank.jsonl", *spm_option], "blank.jsonl:1 has an empty question"),
        (["match", "none", folder, *spm_option], "there are no texts"),
        (["classify", "none", folder, "--names", tmp_path / "empty"], "cannot be read"),
    ]:
        assert main(["predict", *map(str, arguments)]) == 2, message
        assert message in capsys.readouterr().err
