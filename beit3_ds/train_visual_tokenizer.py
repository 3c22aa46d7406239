"""Trains a run's visual tokenizer on any number of ranks.

`deepspeed --num_gpus N --module beit3_ds.train_visual_tokenizer CONFIG.json`, or, in one process,
`beit3 train-visual-tokenizer CONFIG.json`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from beit3_ds.config import ParallelConfig, RunConfig
from beit3_ds.data import TokenizerImages
from beit3_ds.kernels.host_memory import keep_freed_memory
from beit3_ds.rank_program import run_rank_program
from beit3_ds.tokenizers import load_visual_tokenizer
from beit3_ds.training.agreement import check_same_files, check_same_sources
from beit3_ds.training.code_picture import code_picture_path, write_code_picture
from beit3_ds.training.engine import compute_device, joined_ranks
from beit3_ds.training.visual_tokenizer import train_visual_tokenizer


def train(config: RunConfig) -> None:
    """Trains to the end, going on from a checkpoint if any; writes the tokenizer's file and, beside it, a picture.

    Raises:
        ConfigError: for a configuration, data file, teacher or checkpoint that cannot work.
    """
    images = TokenizerImages(config)  # before a process group exists, so that one rank's error leaves none waiting
    with joined_ranks(ParallelConfig()) as mesh:  # the tokenizer is small: every rank is data-parallel
        mesh.check_agreement("configuration", repr(config), "Start all ranks with the same file and the same --set.")
        visual = config.tokenizers.visual
        check_same_files(mesh, {"tokenizers.visual.teacher_weights": visual.teacher_weights})
        check_same_sources(mesh, images.sources())
        keep_freed_memory(compute_device())
        train_visual_tokenizer(config, images, mesh=mesh, device=compute_device())
        if mesh.is_main:
            path = Path(config.tokenizers.visual.path)
            picture = code_picture_path(path)
            write_code_picture(config, load_visual_tokenizer(path), picture)
            print(f"visual tokenizer: drew views, masked views and codes in {picture}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or 2 after one clear line about what the user can mend."""
    return run_rank_program(train, "beit3_ds.train_visual_tokenizer", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
