"""Tests that weights are refused if they lack what a use needs."""

from pathlib import Path

import pytest

from beit3_ds.config import ConfigError
from beit3_ds.inference import (
    DualEncoder,
    LanguageEncoder,
    QuestionAnswerer,
    StatementJudge,
)
from tests.batches import small_model_config
from tests.weights.models import exported, random_model


def test_other_weights_are_refused(spm: Path, tmp_path: Path) -> None:
    path = exported(random_model(small_model_config(text_vocab_size=310)), tmp_path / "weights")
    for use in (DualEncoder, QuestionAnswerer, StatementJudge):
        with pytest.raises(ConfigError, match=r"weights of the task pretraining, without a head that"):
            use.from_pretrained(path, spm)
    small = exported(random_model(small_model_config()), tmp_path / "small")
    with pytest.raises(ConfigError, match="the tokenizer has 302 ids, but the model has 50"):
        LanguageEncoder.from_pretrained(small, spm)
    encoder = LanguageEncoder.from_pretrained(path, spm)
    with pytest.raises(ConfigError, match="the text ' ' holds nothing"):
        encoder([" "])
