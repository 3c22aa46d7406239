"""Provides classes that apply trained weights to images and texts, including the preprocessing."""

from beit3_ds.inference.answerer import Answer, QuestionAnswerer
from beit3_ds.inference.captioner import Captioner
from beit3_ds.inference.classifier import ImageClassifier
from beit3_ds.inference.detector import Detector
from beit3_ds.inference.dual_encoder import DualEncoder
from beit3_ds.inference.encoders import FusionEncoder, LanguageEncoder, PairFeatures, VisionEncoder
from beit3_ds.inference.judge import StatementJudge
from beit3_ds.inference.segmenter import Segmenter

__all__ = [
    "Answer",
    "Captioner",
    "Detector",
    "DualEncoder",
    "FusionEncoder",
    "ImageClassifier",
    "LanguageEncoder",
    "PairFeatures",
    "QuestionAnswerer",
    "Segmenter",
    "StatementJudge",
    "VisionEncoder",
]
