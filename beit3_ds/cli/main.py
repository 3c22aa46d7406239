"""The `beit3` command: thin over the packages."""

import argparse
import sys
from collections.abc import Callable, Sequence

from beit3_ds.cli.bench import add_bench_commands
from beit3_ds.cli.cluster import add_cluster_commands
from beit3_ds.cli.launch import add_launch_command
from beit3_ds.cli.weights import add_weight_commands
from beit3_ds.config import ConfigError
from beit3_ds.config.arguments import OneLineParser, add_config_arguments, add_force_argument, integer, real
from beit3_ds.config.numbers import PROCESSES, RANKS, Range
from beit3_ds.storage_error import StorageError

_Commands = argparse._SubParsersAction  # the type of a group of subcommands has no public name

_EPILOG = """typical order:
  beit3 check ds_configs/quickstart_cpu.json --world-size 2
  beit3 train-text-tokenizer ds_configs/quickstart_cpu.json
  beit3 train-visual-tokenizer ds_configs/quickstart_cpu.json
  deepspeed --num_gpus 2 --module beit3_ds.pretrain ds_configs/quickstart_cpu.json
with data.cache_dir set, once: `beit3 prepare index` first, `beit3 prepare texts` after the text tokenizer

One JSON file describes one run: DeepSpeed's own keys beside a "beit3_ds" section (model, data, tokenizers,
training, parallel).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status.

    The status is 0 for success; 1 if a check fails or a file system fails; 2 after one line about a mistake that the
    user can fix.
    """
    try:
        options = build_parser().parse_args(arguments)
        run: Callable[[argparse.Namespace], int] = options.run
        return run(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (StorageError, OSError) as error:  # OSError: what the command writes to has no room, or forbids it
        print(f"error: {error}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all commands; each sets `run` to its function."""
    parser: argparse.ArgumentParser = OneLineParser(
        prog="beit3",
        description="Pretrain BEiT-3 by masked modeling of images, texts and image-text pairs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run, text in (
        ("check", _check, "check a config for a number of ranks and print what it would train; nothing is read or run"),
        (
            "train-text-tokenizer",
            _train_text_tokenizer,
            "train the run's SentencePiece model on its texts and captions",
        ),
        (
            "train-visual-tokenizer",
            _train_visual_tokenizer,
            "train the run's VQ-KD tokenizer on its images in one process, or go on; use the deepspeed launcher with "
            "--module beit3_ds.train_visual_tokenizer for more ranks",
        ),
        ("pretrain", _pretrain, "pretrain in one process, or resume; use the deepspeed launcher for more ranks"),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add_config_arguments(command)
        command.set_defaults(run=run)
        if name.endswith("-tokenizer"):
            add_force_argument(command)
        if name == "check":
            _add_check_arguments(command)
    show = commands.add_parser("show-codes", help="draw training images, their masks and their codes as colours")
    add_config_arguments(show)
    show.add_argument(
        "--out", default="codes.png", metavar="FILE.png", help="the picture to write (default: codes.png)"
    )
    show.set_defaults(run=_show_codes)
    add_weight_commands(commands)
    prepare = commands.add_parser("prepare", help="index, count and look at the files of a run, once before it")
    prepared = prepare.add_subparsers(metavar="WHAT", required=True)
    _add_prepare_index(prepared)
    _add_prepare_stats(prepared)
    _add_prepare_texts(prepared)
    compare = commands.add_parser("compare-runs", help="how far the losses of two runs lie apart, step by step")
    compare.add_argument("runs", nargs=2, metavar="FOLDER", help="training.output_dir of a run")
    compare.add_argument("--out", metavar="FILE.png", help="also draw both curves and their difference")
    compare.add_argument(
        "--tolerance", type=real(Range(0)), metavar="NATS", help="end with status 1 if the total losses differ by more"
    )
    compare.set_defaults(run=_compare_runs)
    add_cluster_commands(commands)
    add_launch_command(commands)
    add_bench_commands(commands)
    return parser


def _add_check_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--world-size", type=integer(RANKS), default=1, metavar="N", help="ranks (default: 1)")
    command.add_argument(
        "--ranks-per-node", type=integer(Range(1, 1024)), metavar="N", help="ranks per node (default: 8, or all)"
    )
    for name, text in (("memory", "memory"), ("shm", "/dev/shm")):
        command.add_argument(
            f"--node-{name}",
            type=real(Range(0, 1e6)),
            metavar="GIB",
            help=f"refuse a run that needs more {text} on a node",
        )
    command.add_argument(
        "--step-seconds",
        type=real(Range(0.001, 1e6)),
        default=1.0,
        metavar="S",
        help="assumed time of a step in seconds, for rates (default: 1)",
    )


def _add_prepare_index(commands: _Commands) -> None:
    text = "write indices of tars and tables of annotations to data.cache_dir, so that a run starts at once"
    command = commands.add_parser("index", help=text, description=f"{text[0].upper()}{text[1:]}. Goes on if restarted.")
    add_config_arguments(command)
    command.add_argument(
        "--verify", action="store_true", help="compare the files with what is there: tars by CRC-32, annotations whole"
    )
    command.add_argument(
        "--processes", type=integer(PROCESSES), metavar="N", help="tars read at a time (default: one per core)"
    )
    command.set_defaults(run=_prepare_index)


def _add_prepare_stats(commands: _Commands) -> None:
    text = "print what the files of a run hold: samples, sizes, lengths, some texts, what is broken or left out"
    about = f"{text[0].upper()}{text[1:]}. Ends with status 1 if a run over them would fail."
    command = commands.add_parser("stats", help=text, description=about)
    add_config_arguments(command)
    command.add_argument(
        "--samples", type=integer(Range(1)), default=1000, metavar="N", help="samples read per source (default: 1000)"
    )
    command.add_argument("--out", metavar="FILE.png", help="draw some samples with their captions into this picture")
    command.set_defaults(run=_prepare_stats)


def _add_prepare_texts(commands: _Commands) -> None:
    command = commands.add_parser(
        "texts",
        help="tokenize all texts of a run into token files",
        description="Tokenize all training and validation texts of a run. Started again, it goes on where it was.",
    )
    add_config_arguments(command)
    command.add_argument("--part", default="1/1", metavar="I/N", help="do share I of N, as in a Slurm array (from 1)")
    command.add_argument("--processes", type=integer(PROCESSES), metavar="P", help="processes (default: one per core)")
    command.set_defaults(run=_prepare_texts)


def _config_arguments(options: argparse.Namespace) -> list[str]:
    return [options.config, *(f"--set={change}" for change in options.set)]


# Imports stand inside the commands: torch and DeepSpeed take seconds, and a misspelt key should be answered at once.


def _check(options: argparse.Namespace) -> int:
    from beit3_ds.config import load_run_config

    config = load_run_config(options.config, options.set)
    from beit3_ds.data.validation_overlap import check_validation_apart
    from beit3_ds.planner import NodeSize
    from beit3_ds.training.dry_run import describe_dry_run

    check_validation_apart(config.data, must_exist=False)  # the data may lie on other machines
    memory, shm = (None if gib is None else int(gib * 2**30) for gib in (options.node_memory, options.node_shm))
    node = NodeSize(memory=memory, shm=shm)
    print(describe_dry_run(config, options.world_size, options.ranks_per_node, node, options.step_seconds))
    if memory is None and shm is None:
        print("not compared with a machine: --node-memory and --node-shm do that; the run itself does it on every node")
    return 0


def _train_text_tokenizer(options: argparse.Namespace) -> int:
    from beit3_ds.config import load_run_config
    from beit3_ds.data import read_training_lines
    from beit3_ds.tokenizers import TextTokenizer, train_text_tokenizer
    from beit3_ds.tokenizers.recipe import check_can_be_written, describe_trained, is_trained, save_recipe, text_recipe

    config = load_run_config(options.config, options.set)
    path, recipe = config.tokenizers.text.path, text_recipe(config)
    if not path:
        raise ConfigError("tokenizers.text.path is not set: a run without texts and pairs needs no text tokenizer.")

    def read_known() -> dict[str, int]:
        return {"vocab_size": TextTokenizer(path).num_pieces}

    if not options.force and is_trained("tokenizers.text", path, recipe, read_known):
        print(describe_trained("tokenizers.text", path))
        return 0
    check_can_be_written("tokenizers.text", path)
    tokenizer = train_text_tokenizer(config.tokenizers.text, read_training_lines(config.data), config.training.seed)
    save_recipe(path, recipe)
    print(f"wrote {path}: {tokenizer.vocab_size} ids, <mask> is {tokenizer.mask_id}")
    return 0


def _train_visual_tokenizer(options: argparse.Namespace) -> int:
    from beit3_ds.config import load_run_config

    load_run_config(options.config, options.set)  # before the seconds that DeepSpeed takes to import
    from beit3_ds.train_visual_tokenizer import main as train_main

    return train_main([*_config_arguments(options), *(["--force"] if options.force else [])])


def _show_codes(options: argparse.Namespace) -> int:
    from beit3_ds.config import load_run_config
    from beit3_ds.tokenizers import check_visual_tokenizer_fits, load_visual_tokenizer
    from beit3_ds.training.code_picture import write_code_picture

    config = load_run_config(options.config, options.set)
    tokenizer = load_visual_tokenizer(config.tokenizers.visual.path)
    check_visual_tokenizer_fits(tokenizer, config)
    write_code_picture(config, tokenizer, options.out)
    print(f"wrote {options.out}: views, masked views and codes; teacher: {tokenizer.teacher_description}")
    return 0


def _pretrain(options: argparse.Namespace) -> int:
    from beit3_ds.config import load_run_config

    load_run_config(options.config, options.set)  # before the seconds that DeepSpeed takes to import
    from beit3_ds.pretrain import main as pretrain_main

    return pretrain_main(_config_arguments(options))


def _compare_runs(options: argparse.Namespace) -> int:
    from pathlib import Path

    from beit3_ds.training.comparison import compare_runs, plot_comparison

    comparison = compare_runs(*(Path(folder) for folder in options.runs))
    print(comparison.describe())
    if options.out:
        try:
            plot_comparison(comparison, Path(options.out))
        except Exception as error:  # matplotlib may raise any exception
            raise ConfigError(f"--out {options.out} cannot be drawn: {type(error).__name__}: {error}.") from error
    if options.tolerance is None:
        return 0
    difference, step = comparison.largest_difference("loss")
    if difference <= options.tolerance:
        return 0
    print(
        f"the losses of step {step} differ by {difference:.3g} nats, more than {options.tolerance:g}", file=sys.stderr
    )
    return 1


def _prepare_index(options: argparse.Namespace) -> int:
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


def _prepare_stats(options: argparse.Namespace) -> int:
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


def _prepare_texts(options: argparse.Namespace) -> int:
    from beit3_ds.config import load_run_config
    from beit3_ds.data.prepare.texts import Part, prepare_texts
    from beit3_ds.data.validation_overlap import check_validation_apart
    from beit3_ds.tokenizers.text import load_text_tokenizer

    part = Part.parse(options.part)
    config = load_run_config(options.config, options.set)
    check_validation_apart(config.data)
    tokenizer = load_text_tokenizer(config)
    if tokenizer is None:
        print("data.texts is left out of this run: there is nothing to tokenize")
        return 0
    done = prepare_texts(config.data, tokenizer, part, options.processes)
    for line in done.broken:
        print(f"left out: {line}", file=sys.stderr)
    print(
        f"{done.num_tokens:,} tokens in {done.pieces_written + done.pieces_kept} pieces ({done.pieces_kept} were "
        f"there), {len(done.broken)} broken lines"
    )
    if done.sources_left:
        print(f"{done.sources_left} files wait for pieces of other parts; the last part to end completes them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
