"""Data: files to packed micro-batches, as a pure function of seed and step.

In the order of the flow: `shards` (with `tar_members` and `shard_index`), `image_folder`, `annotations` (or what
`annotation_table` keeps of them) and `texts` (of `text_files` or `token_files`, cut by `sentences`) read files,
`sources` opens what a config names, `order` picks samples, `augmentation` and `masking` prepare them in `samples`,
`packing` joins them, `steps` makes a rank's share of a step, and `loader` and `heldout` serve the steps. They use the
workers of `worker_pool` and the time limits of `waiting`. `tokenizer_corpora` reads the same files for the training of
the two tokenizers; `prepare_index`, `prepare_annotations`, `text_preparation`, `statistics`, `heldout_overlap` and
`contact_sheet` look at them beforehand. All reads go through `file_reading` or `open_files`, which outlast a short
failure of the file system; `left_out` reports files and members that become no sample.
"""

from beit3_ds.data.images.shards import TarShards
from beit3_ds.data.loader import build_train_loader
from beit3_ds.data.steps import StepDataset
from beit3_ds.data.tokenizer_corpora import TokenizerImages, View, Views, build_view_loader, read_training_lines
from beit3_ds.data.validation import HeldoutBatches, build_heldout_batches
from beit3_ds.data.workers.waiting import WaitLimits

__all__ = [
    "HeldoutBatches",
    "StepDataset",
    "TarShards",
    "TokenizerImages",
    "View",
    "Views",
    "WaitLimits",
    "build_heldout_batches",
    "build_train_loader",
    "build_view_loader",
    "read_training_lines",
]
