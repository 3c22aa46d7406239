"""Makes predictions for image files and texts, and writes the predictions as JSON or as an HTML page."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from beit3_ds.atomic_file import atomic_write
from beit3_ds.config import ConfigError
from beit3_ds.inference.answerer import QuestionAnswerer
from beit3_ds.inference.captioner import Captioner
from beit3_ds.inference.classifier import ImageClassifier
from beit3_ds.inference.dual_encoder import DualEncoder
from beit3_ds.inference.judge import StatementJudge
from beit3_ds.inference.requests import Question
from beit3_ds.inference.segmenter import Segmenter
from beit3_ds.model.generation import BeamSearch
from beit3_ds.tasks.result_page import ShownSample, choose_shown, write_result_page
from beit3_ds.tasks.segmentation.pictures import encode_label_map

_DIGITS = 6
"""Significant digits of scores in JSON."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Prediction for one image, one question about an image, one text, or one statement about two images."""

    images: Sequence[Path]
    """Image files of the prediction."""
    title: str
    """Title of the prediction on the HTML page: a question, a statement, a retrieval text, or the image's file name."""
    lines: dict[str, str]
    """Lines of text below the title on the HTML page. The page shows each key, such as "caption" or "answers", as the
    label of its line."""
    record: dict[str, Any]
    """JSON object of the prediction."""


def caption_images(captioner: Captioner, images: Sequence[Path], search: BeamSearch) -> list[Prediction]:
    """Returns one prediction per image, with a caption."""
    with broken_images():
        captions = captioner(images, search)
    return [
        Prediction(
            images=[image],
            title=image.name,
            lines={"caption": caption},
            record={"image": str(image), "caption": caption},
        )
        for image, caption in zip(images, captions, strict=True)
    ]


def answer_questions(answerer: QuestionAnswerer, questions: Sequence[Question], top: int) -> list[Prediction]:
    """Returns one prediction per question, with the `top` most probable answers."""
    with broken_images():
        found = answerer([asked.image for asked in questions], [asked.question for asked in questions], top=top)
    predictions = []
    for asked, answers in zip(questions, found, strict=True):
        identifier = {} if asked.identifier is None else {"id": asked.identifier}
        best = [{"answer": answer.text, "score": rounded(answer.score)} for answer in answers]
        record = {**identifier, "image": str(asked.image), "question": asked.question}
        predictions.append(
            Prediction(
                images=[asked.image],
                title=asked.question,
                lines={"answers": ", ".join(f"{answer.text} ({answer.score:.0%})" for answer in answers)},
                record=record | {"answer": answers[0].text, "answers": best},
            )
        )
    return predictions


def judge_statement(judge: StatementJudge, left: Path, right: Path, statement: str) -> list[Prediction]:
    """Returns a list of one prediction: the probability that the statement about two images is true."""
    with broken_images():
        probability = float(judge(left, right, statement)[0])
    record = {"left": str(left), "right": str(right), "statement": statement}
    return [
        Prediction(
            images=[left, right],
            title=statement,
            lines={"true": f"{probability:.0%}"},
            record=record | {"is_true": probability > 0.5, "probability": rounded(probability)},
        )
    ]


def classify_images(classifier: ImageClassifier, images: Sequence[Path], top: int) -> list[Prediction]:
    """Returns one prediction per image, with the `top` most probable classes."""
    with broken_images():
        found = classifier(images, top=top)
    return [
        Prediction(
            images=[image],
            title=image.name,
            lines={"classes": ", ".join(f"{name} ({probability:.0%})" for name, probability in classes)},
            record={
                "image": str(image),
                "classes": [{"class": name, "probability": rounded(value)} for name, value in classes],
            },
        )
        for image, classes in zip(images, found, strict=True)
    ]


def match_texts(dual: DualEncoder, images: Sequence[Path], texts: Sequence[str], top: int) -> list[Prediction]:
    """Returns one prediction per text, with the `top` images of largest cosine similarity to the text."""
    with broken_images():
        image_features = dual.encode_images(images)
    cosines = dual.encode_texts(texts) @ image_features.T
    best = cosines.topk(min(top, len(images)), dim=1)
    predictions = []
    for text, values, places in zip(texts, best.values.tolist(), best.indices.tolist(), strict=True):
        found = [(images[place], value) for place, value in zip(places, values, strict=True)]
        predictions.append(
            Prediction(
                images=[image for image, _ in found],
                title=text,
                lines={"images": ", ".join(f"{image.name} ({value:.3f})" for image, value in found)},
                record={
                    "text": text,
                    "images": [{"image": str(image), "cosine": rounded(value)} for image, value in found],
                },
            )
        )
    return predictions


def segment_images(
    segmenter: Segmenter, images: Sequence[Path], pictures: Path, label_maps: Path | None
) -> list[Prediction]:
    """Segments images, and draws the classes in colours with a legend into one picture per image.

    Args:
        segmenter: the model.
        images: image files; their names without extensions must differ.
        pictures: folder for the pictures; created if missing.
        label_maps: folder for label maps in ADE20K's format (class + 1); created if missing. With None, no label maps
            are written.

    Returns:
        One prediction per image, with the share of pixels per class in descending order.

    Raises:
        ConfigError: if an image is broken, or two images have the same name without extension.
    """
    names = [image.stem for image in images]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ConfigError(
            f"two images have the name {min(repeated)}, and each picture gets the name of its image. Segment them one "
            "by one."
        )
    for folder in filter(None, (pictures, label_maps)):
        folder.mkdir(parents=True, exist_ok=True)
    predictions = []
    for image in images:
        with broken_images():
            (labels,) = segmenter([image])
        drawn = pictures / f"{image.stem}.png"
        segmenter.draw(image, labels).save(drawn)
        record: dict[str, Any] = {"image": str(image), "picture": str(drawn)}
        if label_maps is not None:
            record["label_map"] = str(label_maps / f"{image.stem}.png")
            (label_maps / f"{image.stem}.png").write_bytes(encode_label_map(torch.from_numpy(labels)).numpy().tobytes())
        counts = np.bincount(labels.ravel(), minlength=len(segmenter.names)) / labels.size
        shares = [(segmenter.names[label], float(counts[label])) for label in np.argsort(-counts) if counts[label]]
        predictions.append(
            Prediction(
                images=[image, drawn],
                title=image.name,
                lines={"classes": ", ".join(f"{name} {share:.0%}" for name, share in shares)},
                record=record | {"classes": [{"class": name, "share": rounded(share)} for name, share in shares]},
            )
        )
    return predictions


def write_predictions(predictions: Iterable[Prediction], out: Path | None) -> None:
    """Writes the JSON objects of predictions as a list, to a file or to standard output.

    Args:
        predictions: the predictions.
        out: path of the file; None prints the list.

    Raises:
        OSError: if the file cannot be written.
    """
    text = json.dumps([prediction.record for prediction in predictions], indent=1) + "\n"
    if out is None:
        print(text, end="")
        return
    with atomic_write(out) as file:
        file.write(text.encode())


def write_page(predictions: Sequence[Prediction], page: Path, title: str, max_shown: int) -> None:
    """Writes an HTML page with images and texts of at most `max_shown` predictions. From a longer list, every n-th one
    is shown.

    Raises:
        OSError: if the page cannot be written.
    """
    shown = [predictions[place] for place in choose_shown([None] * len(predictions), min(max_shown, len(predictions)))]
    samples = (
        ShownSample(
            images=[Image.open(image) for image in prediction.images], title=prediction.title, lines=prediction.lines
        )
        for prediction in shown
    )
    note = "" if len(shown) == len(predictions) else f"{len(shown)} of {len(predictions)} predictions."
    write_result_page(page, title, {}, samples, note)


@contextmanager
def broken_images() -> Iterator[None]:
    """Converts the ValueError of a broken image in the `with` block to a `ConfigError`."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{error}. Repair the image, or leave it out.") from error


def rounded(value: float) -> float:
    """Rounds a number to six significant digits, for JSON."""
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else value
