"""Trains a run's visual tokenizer on any number of ranks.

`deepspeed --num_gpus N --module beit3_ds.train_visual_tokenizer CONFIG.json`, or, in one process,
`beit3 train-visual-tokenizer CONFIG.json`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from beit3_ds.config import ConfigError, ParallelConfig, RunConfig, VisualTokenizerConfig
from beit3_ds.config.arguments import add_force_argument
from beit3_ds.data import TokenizerImages
from beit3_ds.kernels.cpu.allocator import ALLOCATOR
from beit3_ds.picture import try_to_write
from beit3_ds.rank_program import run_rank_program
from beit3_ds.runtime.launch_environment import read_launch
from beit3_ds.runtime.process_group import compute_device, joined_ranks
from beit3_ds.runtime.startup_watchdog import watched_start
from beit3_ds.tokenizers import load_visual_tokenizer
from beit3_ds.tokenizers.recipe import Recipe, check_can_be_written, describe_trained, is_trained, visual_recipe
from beit3_ds.training.agreement import check_same_files, check_same_sources
from beit3_ds.training.code_picture import code_picture_path, write_code_picture
from beit3_ds.training.visual_tokenizer import train_visual_tokenizer


def train(config: RunConfig, *, force: bool = False) -> None:
    """Trains the visual tokenizer to the end and writes its file and a picture; resumes from a checkpoint, if any.

    Does nothing if the finished tokenizer of this recipe exists, so a job script can be submitted again.

    Args:
        config: the run's configuration.
        force: trains again if the tokenizer exists, and overwrites it at the end.

    Raises:
        ConfigError: if the configuration, a data file, the teacher or a checkpoint is invalid.
    """
    visual = config.tokenizers.visual
    if not visual.path:
        raise ConfigError(
            "tokenizers.visual.path is not set: a run without images and pairs needs no visual tokenizer."
        )
    if not force and is_trained("tokenizers.visual", visual.path, visual_recipe(config), lambda: _read_known(visual)):
        if read_launch(os.environ).rank == 0:
            print(describe_trained("tokenizers.visual", visual.path), flush=True)
        return
    check_can_be_written("tokenizers.visual", visual.path)
    rank = read_launch(os.environ).rank
    with watched_start(rank, (), config.data.timeout_seconds):  # signals end this program without a handler
        images = TokenizerImages(config)  # before a process group exists, so that no rank waits for one that fails
    with joined_ranks(ParallelConfig()) as mesh:  # the tokenizer is small: every rank is data-parallel
        mesh.check_agreement("configuration", repr(config), "Start all ranks with the same file and the same --set.")
        check_same_files(mesh, {"tokenizers.visual.teacher_weights": visual.teacher_weights})
        check_same_sources(mesh, images.sources())
        ALLOCATOR.keep_freed_memory(compute_device())
        train_visual_tokenizer(config, images, mesh=mesh, device=compute_device())
        if mesh.is_main:
            path = Path(config.tokenizers.visual.path)
            picture = code_picture_path(path)
            if try_to_write(picture, lambda to: write_code_picture(config, load_visual_tokenizer(path), to)):
                print(f"visual tokenizer: drew views, masked views and codes in {picture}", flush=True)


def _read_known(visual: VisualTokenizerConfig) -> Recipe:
    """Returns the architecture that the tokenizer's file records; an imported or copied tokenizer has no recipe."""
    trained = load_visual_tokenizer(visual.path).config
    return {name: getattr(trained, name) for name in ("image_size", "patch_size", "codebook_size")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or 2 after one clear line about what the user can fix."""

    def program(config: RunConfig, options: argparse.Namespace) -> None:
        train(config, force=options.force)

    return run_rank_program(program, "beit3_ds.train_visual_tokenizer", __doc__, arguments, (add_force_argument,))


if __name__ == "__main__":
    sys.exit(main())
