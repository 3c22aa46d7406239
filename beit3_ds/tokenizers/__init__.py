"""Converts texts to SentencePiece ids, and image patches to the codes of a visual tokenizer."""

from beit3_ds.tokenizers.oriented_gradients import OrientedGradients
from beit3_ds.tokenizers.released import import_released_tokenizer
from beit3_ds.tokenizers.teacher import Teacher, build_teacher
from beit3_ds.tokenizers.text import TextTokenizer, train_text_tokenizer
from beit3_ds.tokenizers.visual import (
    VisualTokenizer,
    check_visual_tokenizer_fits,
    load_visual_tokenizer,
    save_visual_tokenizer,
)

__all__ = [
    "OrientedGradients",
    "Teacher",
    "TextTokenizer",
    "VisualTokenizer",
    "build_teacher",
    "check_visual_tokenizer_fits",
    "import_released_tokenizer",
    "load_visual_tokenizer",
    "save_visual_tokenizer",
    "train_text_tokenizer",
]
