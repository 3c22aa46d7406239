"""Implements `beit3 predict`, which applies trained weights to images and texts."""

import argparse
from typing import Any

from beit3_ds.cli.command import Subparsers, add_command
from beit3_ds.config import ConfigError
from beit3_ds.config.arguments import integer, real
from beit3_ds.config.numbers import Range

_TOP = Range(1, 2**20)


def add_predict_command(subparsers: Subparsers) -> None:
    """Adds the subcommand `predict`, with one subcommand per kind of prediction."""
    predict = subparsers.add_parser(
        "predict", help="use trained weights: captions, answers, matches, classes, objects, masks"
    )
    uses = predict.add_subparsers(metavar="WHAT", required=True)
    _add_caption(uses)
    _add_answer(uses)
    _add_match(uses)
    _add_judge(uses)
    _add_classify(uses)
    _add_segment(uses)
    _add_detect(uses)


def _add_caption(subparsers: Subparsers) -> None:
    command = add_command(subparsers, "caption", _caption, "write a caption of each image")
    _add_weights(command)
    _add_images(command)
    command.add_argument(
        "--beams", type=integer(Range(1, 1000)), default=3, help="beams of the beam search (default: 3)"
    )
    command.add_argument(
        "--length-penalty",
        type=real(Range(0, 10)),
        default=0.6,
        help="a caption's log-probability is divided by its length to this power (default: 0.6)",
    )
    command.add_argument(
        "--max-length", type=integer(Range(4, 2**18)), default=20, help="maximum token ids per caption (default: 20)"
    )
    _add_results(command)


def _add_answer(subparsers: Subparsers) -> None:
    details = "Give an image and a question, or a file of questions."
    command = add_command(subparsers, "answer", _answer, "answer questions about images", details=details)
    _add_weights(command)
    command.add_argument("--image", help="file of the image")
    command.add_argument("--question", help="question about the image")
    command.add_argument("--file", help="JSON lines with 'question', 'image' and optionally 'id'")
    command.add_argument("--images", metavar="FOLDER", help="folder of the images (default: the folder of --file)")
    command.add_argument("--answers", metavar="FILE", help="list of answers (default: the list in the weights)")
    command.add_argument("--top", type=integer(_TOP), default=3, help="answers per question (default: 3)")
    _add_results(command)


def _add_match(subparsers: Subparsers) -> None:
    command = add_command(subparsers, "match", _match, "find the images that fit each text best")
    _add_weights(command)
    _add_images(command)
    command.add_argument("--text", action="append", default=[], help="a text; may be given several times")
    command.add_argument("--texts", metavar="FILE", help="file with one text per line")
    command.add_argument("--top", type=integer(_TOP), default=5, help="images per text (default: 5)")
    _add_results(command)


def _add_judge(subparsers: Subparsers) -> None:
    command = add_command(subparsers, "judge", _judge, "judge whether a statement about two images is true")
    _add_weights(command)
    command.add_argument("left", help="file of the left image")
    command.add_argument("right", help="file of the right image")
    command.add_argument("statement", help="statement about both images")
    _add_results(command)


def _add_classify(subparsers: Subparsers) -> None:
    command = add_command(subparsers, "classify", _classify, "find the most likely classes of each image")
    _add_weights(command, needs_tokenizer=False)
    _add_images(command)
    command.add_argument("--names", metavar="FILE", required=True, help="file with the name of one class per line")
    command.add_argument("--top", type=integer(_TOP), default=5, help="classes per image (default: 5)")
    _add_results(command)


def _add_segment(subparsers: Subparsers) -> None:
    command = add_command(subparsers, "segment", _segment, "assign a class to each pixel of images")
    _add_model(command)
    _add_images(command)
    command.add_argument(
        "--pictures",
        metavar="FOLDER",
        required=True,
        help="write a picture per image, with coloured classes and a legend, to this folder",
    )
    command.add_argument(
        "--label-maps", metavar="FOLDER", help="write a PNG per image, with class + 1 per pixel, to this folder"
    )
    command.add_argument(
        "--scale",
        type=real(Range(0.05, 20)),
        action="append",
        metavar="S",
        help="scale at which images are segmented; may be given several times, to average the scores (default: as in "
        "the training run)",
    )
    command.add_argument("--flip", action="store_true", help="average the scores with those of the flipped image")
    _add_results(command)


def _add_detect(subparsers: Subparsers) -> None:
    command = add_command(subparsers, "detect", _detect, "find objects in images, with boxes, masks and classes")
    _add_model(command)
    _add_images(command)
    command.add_argument(
        "--pictures",
        metavar="FOLDER",
        required=True,
        help="write a picture per image, with boxes, masks and classes, to this folder",
    )
    command.add_argument("--coco", metavar="FILE.json", help="write all detections to this COCO annotation file")
    command.add_argument(
        "--least-score",
        type=real(Range(0, 1)),
        default=0.3,
        metavar="P",
        help="minimum score of detections that are drawn and printed (default: 0.3)",
    )
    command.add_argument(
        "--size",
        type=integer(Range(1, 2**14)),
        action="append",
        metavar="PIXELS",
        help="side in pixels to which images are resized; may be given several times (default: as in the training run)",
    )
    command.add_argument("--flip", action="store_true", help="also detect in flipped images")
    _add_results(command)


def _add_weights(command: argparse.ArgumentParser, *, needs_tokenizer: bool = True) -> None:
    _add_model(command)
    optional = "" if needs_tokenizer else "; not needed for a linear layer"
    command.add_argument(
        "--tokenizer",
        metavar="FILE",
        required=needs_tokenizer,
        help=f"SentencePiece file with which the weights were trained{optional}",
    )


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("weights", help="exported, imported or released weights, a checkpoint, or a run's folder")
    command.add_argument("--device", default="cpu", help="device, such as cuda (default: cpu)")
    command.add_argument(
        "--image-size",
        type=integer(Range(1, 2**14)),
        help="side in pixels of the model's input (default: as in the weights' configuration)",
    )


def _add_images(command: argparse.ArgumentParser) -> None:
    command.add_argument("images", nargs="+", help="image files, or folders of images")


def _add_results(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out", metavar="FILE.json", help="write the predictions to this file instead of printing them"
    )
    command.add_argument("--page", metavar="FILE.html", help="write a page with images and predictions")
    command.add_argument(
        "--page-samples",
        type=integer(Range(1, 10_000)),
        default=100,
        metavar="N",
        help="samples on the page (default: 100)",
    )


def _caption(options: argparse.Namespace) -> int:
    from beit3_ds.inference import Captioner
    from beit3_ds.inference.predictions import caption_images
    from beit3_ds.inference.requests import find_images
    from beit3_ds.model.generation import BeamSearch

    images = find_images(options.images)
    search = BeamSearch(num_beams=options.beams, length_penalty=options.length_penalty, max_length=options.max_length)
    captioner = Captioner.from_pretrained(options.weights, options.tokenizer, **_loading(options))
    return _write(options, caption_images(captioner, images, search), "Captions")


def _answer(options: argparse.Namespace) -> int:
    from beit3_ds.inference import QuestionAnswerer
    from beit3_ds.inference.predictions import answer_questions
    from beit3_ds.inference.requests import Question, find_images, read_questions

    if (options.file is None) == (options.image is None) or (options.image is None) != (options.question is None):
        raise ConfigError("answer: give either --image and --question, or --file.")
    if options.file:
        questions = read_questions(options.file, options.images)
    else:
        questions = [Question(image=image, question=options.question) for image in find_images([options.image])]
    answerer = QuestionAnswerer.from_pretrained(
        options.weights, options.tokenizer, options.answers, **_loading(options)
    )
    return _write(options, answer_questions(answerer, questions, options.top), "Answers")


def _match(options: argparse.Namespace) -> int:
    from beit3_ds.inference import DualEncoder
    from beit3_ds.inference.predictions import match_texts
    from beit3_ds.inference.requests import find_images, read_names

    images = find_images(options.images)
    texts = [*options.text, *(read_names(options.texts) if options.texts else [])]
    if not texts:
        raise ConfigError("match: there are no texts. Give --text or --texts.")
    dual = DualEncoder.from_pretrained(options.weights, options.tokenizer, **_loading(options))
    return _write(options, match_texts(dual, images, texts, options.top), "Images by text")


def _judge(options: argparse.Namespace) -> int:
    from beit3_ds.inference import StatementJudge
    from beit3_ds.inference.predictions import judge_statement
    from beit3_ds.inference.requests import find_images

    left, right = (find_images([path])[0] for path in (options.left, options.right))
    judge = StatementJudge.from_pretrained(options.weights, options.tokenizer, **_loading(options))
    return _write(options, judge_statement(judge, left, right, options.statement), "Statements")


def _classify(options: argparse.Namespace) -> int:
    from beit3_ds.inference import ImageClassifier
    from beit3_ds.inference.predictions import classify_images
    from beit3_ds.inference.requests import find_images, read_names

    images, names = find_images(options.images), read_names(options.names)
    classifier = ImageClassifier.from_pretrained(options.weights, names, options.tokenizer, **_loading(options))
    return _write(options, classify_images(classifier, images, options.top), "Classes")


def _segment(options: argparse.Namespace) -> int:
    from pathlib import Path

    from beit3_ds.inference import Segmenter
    from beit3_ds.inference.predictions import segment_images
    from beit3_ds.inference.requests import find_images

    images = find_images(options.images)
    changes = {"scales": options.scale, "flips": options.flip or None}
    segmenter = Segmenter.from_pretrained(options.weights, **changes, **_loading(options))
    label_maps = Path(options.label_maps) if options.label_maps else None
    return _write(options, segment_images(segmenter, images, Path(options.pictures), label_maps), "Segmentation")


def _detect(options: argparse.Namespace) -> int:
    from pathlib import Path

    from beit3_ds.inference import Detector
    from beit3_ds.inference.detections import detect_objects
    from beit3_ds.inference.requests import find_images

    images = find_images(options.images)
    changes = {"test_sizes": options.size, "test_flip": options.flip or None}
    detector = Detector.from_pretrained(options.weights, **changes, **_loading(options))
    coco = Path(options.coco) if options.coco else None
    found = detect_objects(detector, images, Path(options.pictures), coco, options.least_score)
    return _write(options, found, "Detected objects")


def _loading(options: argparse.Namespace) -> Any:
    """Returns the options for `from_pretrained`; checks that the device and the output folders exist.

    Raises:
        ConfigError: if torch lacks the device, or the folder of an output file does not exist.
    """
    from pathlib import Path

    import torch

    for option, path in (("--out", options.out), ("--page", options.page), ("--coco", getattr(options, "coco", None))):
        if path and not Path(path).parent.is_dir():
            raise ConfigError(f"{option} {path}: there is no folder {Path(path).parent}. Create it, or name another.")
    try:
        device = torch.empty(0, device=options.device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {options.device}: {reason.rstrip('.')}. Name a device that torch has.") from None
    return {"device": device, **({"image_size": options.image_size} if options.image_size else {})}


def _write(options: argparse.Namespace, predictions: Any, title: str) -> int:
    from pathlib import Path

    from beit3_ds.inference.predictions import write_page, write_predictions

    write_predictions(predictions, Path(options.out) if options.out else None)
    if options.page:
        write_page(predictions, Path(options.page), title, options.page_samples)
    return 0
