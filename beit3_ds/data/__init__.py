"""Data: files to packed micro-batches, as a pure function of seed and step.

In the order of the flow: `files` finds and reads files, `images` and `text` make samples of them, `sources` opens what
a config names, `order` picks samples, `samples` crops, tokenizes and masks them, `packing` joins them into
micro-batches, `steps` makes a rank's share of a step, and `loader` and `validation` serve the steps with the processes
of `workers`. `tokenizer_corpora` reads the same files for the training of the two tokenizers, and `prepare` looks at
them before a run. All reads outlast a short failure of the file system (`files.reading`, `files.open_files`).
"""

from beit3_ds.data.images.shards import TarShards
from beit3_ds.data.loader import build_train_loader
from beit3_ds.data.steps import StepDataset
from beit3_ds.data.tokenizer_corpora import TokenizerImages, View, Views, build_view_loader, read_training_lines
from beit3_ds.data.validation import ValidationBatches, build_validation_batches
from beit3_ds.data.workers.waiting import WaitLimits

__all__ = [
    "StepDataset",
    "TarShards",
    "TokenizerImages",
    "ValidationBatches",
    "View",
    "Views",
    "WaitLimits",
    "build_train_loader",
    "build_validation_batches",
    "build_view_loader",
    "read_training_lines",
]
