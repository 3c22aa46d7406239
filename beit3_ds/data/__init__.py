"""Turns files into packed micro-batches, as a pure function of seed and step.

The modules in the order of the flow: `files` finds and reads files, and retries reads that fail. `images` and `text`
make samples of files, and `sources` opens the sources that a config names. `order` picks samples; `samples` crops,
tokenizes and masks them; `packing` joins them into micro-batches; `steps` builds a rank's share of a step. `loader` and
`validation` serve steps with the processes of `workers`, and `evaluation` serves all samples of a split.
`tokenizer_corpora` reads the same files to train the text tokenizer, and `prepare` indexes and describes them before a
run.
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
