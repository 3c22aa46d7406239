"""Reads images and texts from files and packs them into micro-batches.

The content of a step depends only on the data, the config, the seed and the step number. A step has samples of up to
three kinds, called streams: images, image-text pairs and texts.

The modules in the order of the data flow:

* `files` finds and reads files.
* `images` and `text` read samples from files, and `sources` opens the sources in a config.
* `order` picks the samples of each step.
* `samples` prepares one sample, `packing` joins samples into a micro-batch, and `steps` builds a rank's share of a
  step.
* `loader`, `validation` and `evaluation` serve batches; the processes of `workers` prepare them.

Two modules run before training: `tokenizer_corpora` reads texts to train a tokenizer, and `prepare` indexes files.
"""

from beit3_ds.data.evaluation import EvaluationBatches
from beit3_ds.data.images.shards import TarShards
from beit3_ds.data.loader import build_train_loader
from beit3_ds.data.steps import StepDataset
from beit3_ds.data.tokenizer_corpora import read_training_lines
from beit3_ds.data.validation import ValidationBatches, build_validation_batches
from beit3_ds.data.workers.waiting import WaitLimits

__all__ = [
    "EvaluationBatches",
    "StepDataset",
    "TarShards",
    "ValidationBatches",
    "WaitLimits",
    "build_train_loader",
    "build_validation_batches",
    "read_training_lines",
]
