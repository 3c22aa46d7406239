"""Implements `beit3 show-samples`, which draws a run's training samples after augmentation."""

import argparse

from beit3_ds.cli.command import Subparsers, add_command
from beit3_ds.config import ConfigError
from beit3_ds.config.arguments import add_config_arguments, integer
from beit3_ds.config.numbers import Range


def add_show_samples_command(subparsers: Subparsers) -> None:
    """Adds the subcommand `show-samples`."""
    summary = "draw the first training samples of a run after augmentation, with their targets"
    command = add_command(subparsers, "show-samples", _show_samples, summary, writes_files=True)
    add_config_arguments(command)
    command.add_argument(
        "--out", default="samples.html", metavar="FILE.html", help="the page to write (default: samples.html)"
    )
    command.add_argument(
        "--count", type=integer(Range(1, 10_000)), default=24, metavar="N", help="samples shown (default: 24)"
    )


def _show_samples(options: argparse.Namespace) -> int:
    from itertools import islice
    from pathlib import Path

    from beit3_ds.config import load_run_config
    from beit3_ds.tasks import RankShare, build_task
    from beit3_ds.tasks.result_page import write_result_page

    config = load_run_config(options.config, options.set)
    share = RankShare(
        data_parallel_rank=0, data_parallel_size=1, embeds=True, predicts=True, reads=True, splits=("train",)
    )
    opened = build_task(config).open(share)
    assert opened.dataset is not None, "the rank reads the training split"
    samples = (sample for step in range(len(opened.dataset)) for sample in opened.dataset.iterate_samples(step))
    shown = [drawn for sample in islice(samples, options.count) if (drawn := opened.draw_sample(sample)) is not None]
    if not shown:
        raise ConfigError(
            f"show-samples: the task {config.task.name} draws no samples. Tasks that do: detection, segmentation."
        )
    write_result_page(Path(options.out), f"Training samples of {Path(options.config).name}", {}, shown)
    print(f"wrote {options.out}: {len(shown)} samples of the run's first steps")
    return 0
