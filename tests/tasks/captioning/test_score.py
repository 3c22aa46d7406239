"""Tests caption metrics, with and without the optional packages that some metrics need."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from beit3_ds.config import ConfigError
from beit3_ds.tasks.captioning import score
from beit3_ds.tasks.captioning.score import METRICS, score_captions, write_caption_results

REFERENCES = {
    1: ["A red circle.", "there is a red circle"],
    "b": ["a blue bar", "we see a blue bar"],
    7: ["a green ring and a red cross", "there is a green ring near a red cross"],
}
needs_java = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None,
    reason="pycocoevalcap or Java is missing",
)


def test_exact_match_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score.importlib.util, "find_spec", lambda name: None)
    found = score_captions({1: "a  RED circle.", "b": "a blue ring", 7: ""}, REFERENCES)
    assert found.scores == {"exact_match": 1 / 3}  # catches metrics that are 0 where they could not be computed
    assert set(found.unavailable) == set(METRICS) and "pip install" in found.unavailable["CIDEr"]


def test_without_java_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(score.shutil, "which", lambda name: None)
    found = score_captions({key: texts[0] for key, texts in REFERENCES.items()}, REFERENCES)
    assert found.scores == {"exact_match": 1.0} and "Java" in found.unavailable["SPICE"]


@pytest.mark.slow  # METEOR starts a Java process that loads its paraphrases
@needs_java
def test_official_metrics() -> None:
    captions = {1: "a red circle", "b": "a blue bar", 7: "a green ring"}
    found = score_captions(captions, REFERENCES)
    assert {"BLEU-1", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"} <= set(found.scores)
    assert ("SPICE" in found.unavailable) != ("SPICE" in found.scores)
    # By hand: 9 of 9 words are in the references; 9 words against 3 + 3 + 7 nearest ones give the brevity penalty.
    assert found.scores["BLEU-1"] == pytest.approx(2.718281828 ** (1 - 13 / 9), abs=1e-6)
    worse = score_captions(captions | {1: "", "b": "a red"}, REFERENCES).scores
    assert all(worse[name] < found.scores[name] for name in ("BLEU-1", "METEOR", "ROUGE-L", "CIDEr"))
    shuffled = {key: captions[key] for key in reversed(captions)}
    assert score_captions(shuffled, dict(reversed(REFERENCES.items()))).scores == found.scores


def test_images_must_be_the_same() -> None:
    with pytest.raises(ConfigError, match="image 7 has no caption"):
        score_captions({1: "x", "b": "y"}, REFERENCES)
    with pytest.raises(ConfigError, match="image 1 has no references"):
        score_captions({1: "x"}, {1: []})


def test_results_file(tmp_path: Path) -> None:
    write_caption_results(tmp_path / "captions.json", {391895: "a café", "x": "b"})
    assert json.loads((tmp_path / "captions.json").read_text(encoding="utf-8")) == [
        {"image_id": 391895, "caption": "a café"},
        {"image_id": "x", "caption": "b"},
    ]
