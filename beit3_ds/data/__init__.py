"""Data: files to packed micro-batches, as a pure function of seed and step.

In the order of the flow: `shards` and `texts` read files, `order` picks samples, `augmentation` and `masking` prepare
them in `samples`, `packing` joins them, `steps` makes a rank's share of a step, `loader` and `heldout` serve them.
`tokenizer_corpora` reads the same files for the training of the two tokenizers.
"""

from beit3_ds.data.heldout import HeldoutBatches, build_heldout_batches
from beit3_ds.data.loader import build_train_loader
from beit3_ds.data.steps import StepDataset
from beit3_ds.data.tokenizer_corpora import TokenizerImages, build_view_loader, read_training_lines

__all__ = [
    "HeldoutBatches",
    "StepDataset",
    "TokenizerImages",
    "build_heldout_batches",
    "build_train_loader",
    "build_view_loader",
    "read_training_lines",
]
