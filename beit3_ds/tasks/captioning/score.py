"""Computes caption metrics with pycocoevalcap, an optional package that needs Java.

A metric that cannot be computed is reported with the reason, not as 0.
"""

import contextlib
import importlib.util
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from beit3_ds.atomic_file import atomic_write
from beit3_ds.config import ConfigError

Identifier = int | str
"""Image id in result files."""
METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE")
"""Names of the official metrics, in the order of the official evaluation."""


class CaptionScores(NamedTuple):
    """Holds the metrics of a split's captions."""

    scores: dict[str, float]
    """Value of each computed metric, by name: CIDEr from 0 to 10, all other metrics from 0 to 1."""
    unavailable: dict[str, str]
    """Reason why a metric could not be computed, by metric name."""


def score_captions(
    captions: Mapping[Identifier, str], references: Mapping[Identifier, Sequence[str]], *, official: bool = True
) -> CaptionScores:
    """Scores one caption per image against reference captions.

    Always computes `exact_match`, because this metric needs no package. It is the share of captions that equal a
    reference up to case and white space. The official metrics use the tokenizer of the official evaluation.

    Args:
        captions: caption of each image, by image id.
        references: captions that people wrote, by image id.
        official: whether to compute the official metrics. With False, the official metrics are neither in `scores` nor
            in `unavailable`.

    Raises:
        ConfigError: if an image has no caption or no references.
    """
    if captions.keys() != references.keys():
        odd = next(iter(captions.keys() ^ references.keys()))
        lacks = "caption" if odd in references else "references"
        raise ConfigError(f"captioning: image {odd!r} has no {lacks}. Score the captions of the same split.")
    for identifier, texts in references.items():
        if not texts:
            raise ConfigError(f"captioning: image {identifier!r} has no references, as in a test split.")
    exact = [_plain(captions[key]) in map(_plain, texts) for key, texts in references.items()]
    scores = {"exact_match": sum(exact) / max(1, len(exact))}
    if not official:
        return CaptionScores(scores, {})
    if reason := _missing_part():
        return CaptionScores(scores, dict.fromkeys(METRICS, reason))
    return _score(captions, references, scores)


def _plain(caption: str) -> str:
    return " ".join(caption.lower().split())


def _missing_part() -> str:
    """Returns a message if a package or program for the official metrics is missing; otherwise an empty string."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        return "pycocoevalcap is not installed: pip install beit3_ds[captioning]"
    if shutil.which("java") is None:
        return "the official tokenizer needs Java: install a Java runtime, version 8 or later"
    return ""


def _missing_spice_part() -> str:
    """Returns a message if the language models that SPICE needs are missing; otherwise an empty string."""
    spec = importlib.util.find_spec("pycocoevalcap.spice")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else Path()
    if not list(folder.glob("stanford-corenlp-*-models.jar")):
        return f"SPICE needs the Stanford CoreNLP models, which are not in {folder}"
    return ""


def _score(
    captions: Mapping[Identifier, str], references: Mapping[Identifier, Sequence[str]], scores: dict[str, float]
) -> CaptionScores:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # The tokenizer reads one caption per line, so captions must not be empty. The order of images is fixed.
    keys = sorted(captions, key=lambda key: (str(type(key)), key))
    tokenizer = PTBTokenizer()
    ours = tokenizer.tokenize({key: [{"caption": " ".join(captions[key].split()) or "."}] for key in keys})
    theirs = tokenizer.tokenize(
        {key: [{"caption": " ".join(text.split())} for text in references[key]] for key in keys}
    )
    unavailable: dict[str, str] = {}
    for names, build in _scorers():
        reason = _missing_spice_part() if names == ("SPICE",) else ""
        if reason:
            unavailable["SPICE"] = reason
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the scorers print their progress
                value, _ = build().compute_score(theirs, ours)
        except Exception as error:  # Java ended, or a part of the package is missing: other metrics are not affected
            unavailable |= dict.fromkeys(names, f"{type(error).__name__}: {error}")
            continue
        values = value if isinstance(value, list) else [value]
        scores |= {name: float(found) for name, found in zip(names, values, strict=True)}
    return CaptionScores(scores, unavailable)


def _scorers() -> list[tuple[tuple[str, ...], Callable[[], Any]]]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.spice.spice import Spice

    return [
        (METRICS[:4], lambda: Bleu(4)),
        (("METEOR",), Meteor),
        (("ROUGE-L",), Rouge),
        (("CIDEr",), Cider),
        (("SPICE",), Spice),
    ]


def write_caption_results(path: Path, captions: Mapping[Identifier, str]) -> None:
    """Writes captions in the format of the COCO and nocaps servers: a JSON list of `image_id` and `caption`."""
    results = [{"image_id": identifier, "caption": caption} for identifier, caption in captions.items()]
    with atomic_write(path) as file:
        file.write(json.dumps(results, ensure_ascii=False).encode())
