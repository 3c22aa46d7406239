"""Implements `beit3 prepare`, which indexes, describes and tokenizes the files of a run before the run starts."""

import argparse
import sys

from beit3_ds.cli.command import Subparsers, add_command
from beit3_ds.config import ConfigError
from beit3_ds.config.arguments import add_config_arguments, integer
from beit3_ds.config.numbers import PROCESSES, Range


def add_prepare_command(subparsers: Subparsers) -> None:
    """Adds the subcommand `prepare`, with the subcommands `index`, `stats` and `texts`."""
    prepare = subparsers.add_parser(
        "prepare", help="index, inspect and tokenize the files of a run, once before the run starts"
    )
    prepared = prepare.add_subparsers(metavar="WHAT", required=True)
    _add_index(prepared)
    _add_stats(prepared)
    _add_texts(prepared)


def _add_index(subparsers: Subparsers) -> None:
    summary = "write indices of tars and tables of annotations to data.cache_dir, so that a run starts at once"
    command = add_command(
        subparsers, "index", _index, summary, details="Resumes if it was interrupted.", writes_files=True
    )
    add_config_arguments(command)
    command.add_argument(
        "--verify",
        action="store_true",
        help="compare the files with existing indices: tars by CRC-32, annotations in full",
    )
    command.add_argument(
        "--processes", type=integer(PROCESSES), metavar="N", help="tars read at a time (default: one per core)"
    )


def _add_stats(subparsers: Subparsers) -> None:
    summary = "print the contents of a run's files: samples, sizes, lengths, some texts, broken and skipped records"
    details = "Exits with status 1 if a run that reads these files would fail."
    command = add_command(subparsers, "stats", _stats, summary, details=details)
    add_config_arguments(command)
    command.add_argument(
        "--samples", type=integer(Range(1)), default=1000, metavar="N", help="samples read per source (default: 1000)"
    )
    command.add_argument("--out", metavar="FILE.png", help="draw some samples with their captions into this picture")


def _add_texts(subparsers: Subparsers) -> None:
    summary = "tokenize all training and validation texts of a run into token files"
    command = add_command(
        subparsers, "texts", _texts, summary, details="Resumes if it was interrupted.", writes_files=True
    )
    add_config_arguments(command)
    command.add_argument(
        "--part",
        default="1/1",
        metavar="I/N",
        help="tokenize only share I of N, such as one task of a Slurm array (I from 1 to N)",
    )
    command.add_argument("--processes", type=integer(PROCESSES), metavar="P", help="processes (default: one per core)")


def _index(options: argparse.Namespace) -> int:
    from beit3_ds.config import load_run_config
    from beit3_ds.data.prepare.annotations import prepare_annotations
    from beit3_ds.data.prepare.index import describe_folders, describe_indices, prepare_indices, shard_paths
    from beit3_ds.data.validation_overlap import check_validation_apart

    data = load_run_config(options.config, options.set).data
    if data.cache_dir is None:
        raise ConfigError("data: cache_dir is not set. Name a folder for the indices in the config.")
    check_validation_apart(data)
    tars = shard_paths(data)
    shards = prepare_indices(
        tars,
        data.cache_dir,
        verify=options.verify,
        num_processes=options.processes,
        timeout_seconds=data.timeout_seconds,
    )
    print("\n".join([describe_indices(shards), *describe_folders(data)]))
    if done := prepare_annotations(data, verify=options.verify):
        print(done)
    return 0


def _stats(options: argparse.Namespace) -> int:
    from beit3_ds.config import load_run_config
    from beit3_ds.data.prepare.contact_sheet import draw_contact_sheet
    from beit3_ds.data.prepare.statistics import describe_streams, open_sources

    data = load_run_config(options.config, options.set).data
    report = describe_streams(data, options.samples)
    print(report.text)
    if options.out:
        try:
            draw_contact_sheet(open_sources(data)).save(options.out, "png")
        except OSError as error:
            raise ConfigError(f"--out {options.out} cannot be written: {error}. Name another file.") from error
        print(f"wrote {options.out}")
    for problem in report.problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if report.problems else 0


def _texts(options: argparse.Namespace) -> int:
    from beit3_ds.config import load_run_config
    from beit3_ds.data.prepare.texts import WorkShare, prepare_texts
    from beit3_ds.data.validation_overlap import check_validation_apart
    from beit3_ds.tokenizers.text import load_text_tokenizer

    share = WorkShare.parse(options.part)
    config = load_run_config(options.config, options.set)
    check_validation_apart(config.data)
    tokenizer = load_text_tokenizer(config)
    if tokenizer is None:
        print("data.texts is left out of this run: there is nothing to tokenize")
        return 0
    done = prepare_texts(config.data, tokenizer, share, options.processes)
    for line in done.broken:
        print(f"left out: {line}", file=sys.stderr)
    print(
        f"{done.num_tokens:,} tokens in {done.pieces_written + done.pieces_kept} pieces ({done.pieces_kept} were "
        f"there), {len(done.broken)} broken lines"
    )
    if done.files_left:
        print(f"{done.files_left} files wait for pieces of other shares; the last share to end completes them")
    return 0
