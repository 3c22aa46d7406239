"""Turns files into packed micro-batches, as a pure function of seed and step.

In the order of the flow: `files` finds and reads files. `images` and `text` make samples of files, and `sources` opens
the sources of a config. `order` picks samples, `samples` prepares them, and `packing` joins them into micro-batches.
`steps` builds a rank's share of a step. `loader`, `validation` and `evaluation` serve batches with the processes of
`workers`. Before a run, `tokenizer_corpora` reads texts for the tokenizer, and `prepare` indexes files.
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
