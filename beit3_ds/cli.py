"""The `beit3` command: thin over the packages."""

import argparse
import sys
from collections.abc import Callable, Sequence

from beit3_ds.config import ConfigError

_EPILOG = """typical order:
  beit3 check ds_configs/quickstart_cpu.json --world-size 2
  beit3 train-text-tokenizer ds_configs/quickstart_cpu.json
  beit3 train-visual-tokenizer ds_configs/quickstart_cpu.json
  deepspeed --num_gpus 2 --module beit3_ds.pretrain ds_configs/quickstart_cpu.json

One JSON file describes one run: DeepSpeed's own keys beside a "beit3_ds" section (model, data, tokenizers, training).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status: 0, or 2 after one clear line about what the user can mend."""
    options = _build_parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
        command.add_argument("config", help="the run's JSON file, e.g. ds_configs/quickstart_cpu.json")
        command.set_defaults(run=run)
        if name == "check":
            command.add_argument("--world-size", type=int, default=1, metavar="N", help="ranks (default: 1)")
    show = commands.add_parser("show-codes", help="draw training images, their masks and their codes as colours")
    show.add_argument("config", help="the run's JSON file, e.g. ds_configs/quickstart_cpu.json")
    show.add_argument(
        "--out", default="codes.png", metavar="FILE.png", help="the picture to write (default: codes.png)"
    )
    show.set_defaults(run=_show_codes)
    importing = commands.add_parser("import-visual-tokenizer", help="read a tokenizer that BEiT v2 released")
    importing.add_argument("file", help="the released .pth file of VQ-KD")
    importing.add_argument("out", help="the .safetensors file to write: tokenizers.visual.path of a run")
    importing.add_argument(
        "--image-size", type=int, metavar="PX", help="view of the tokenizer; 256 for a patch-14 model at 224 px"
    )
    importing.set_defaults(run=_import_visual_tokenizer)
    bench = commands.add_parser("bench", help="measure a choice that was made by measurement")
    benches = bench.add_subparsers(metavar="WHAT", required=True)
    attention = benches.add_parser("attention", help="ways to batch ragged sequences inside attention, on this device")
    attention.set_defaults(run=_bench_attention)
    return parser


# Imports stand inside the commands: torch and DeepSpeed take seconds, and a misspelt key should be answered at once.


def _check(options: argparse.Namespace) -> int:
    from beit3_ds.config import load_run_config
    from beit3_ds.training.dry_run import describe_run

    print(describe_run(load_run_config(options.config), options.world_size))
    return 0


def _train_text_tokenizer(options: argparse.Namespace) -> int:
    from beit3_ds.config import load_run_config
    from beit3_ds.data import read_training_lines
    from beit3_ds.tokenizers import train_text_tokenizer

    config = load_run_config(options.config)
    tokenizer = train_text_tokenizer(config.tokenizers.text, read_training_lines(config.data), config.training.seed)
    print(f"wrote {config.tokenizers.text.path}: {tokenizer.vocab_size} ids, <mask> is {tokenizer.mask_id}")
    return 0


def _train_visual_tokenizer(options: argparse.Namespace) -> int:
    from beit3_ds.config import load_run_config

    load_run_config(options.config)  # before the seconds that DeepSpeed takes to import
    from beit3_ds.train_visual_tokenizer import main as train_main

    return train_main([options.config])


def _show_codes(options: argparse.Namespace) -> int:
    from beit3_ds.config import load_run_config
    from beit3_ds.tokenizers import check_visual_tokenizer_fits, load_visual_tokenizer
    from beit3_ds.training.code_picture import write_code_picture

    config = load_run_config(options.config)
    tokenizer = load_visual_tokenizer(config.tokenizers.visual.path)
    check_visual_tokenizer_fits(tokenizer, config)
    write_code_picture(config, tokenizer, options.out)
    print(f"wrote {options.out}: views, masked views and codes; teacher: {tokenizer.teacher_description}")
    return 0


def _import_visual_tokenizer(options: argparse.Namespace) -> int:
    from beit3_ds.tokenizers import import_released_tokenizer, save_visual_tokenizer

    tokenizer = import_released_tokenizer(options.file, options.out, image_size=options.image_size)
    save_visual_tokenizer(options.out, tokenizer)
    config = tokenizer.config
    print(f"wrote {options.out}: {config.codebook_size} codes, {config.image_size} px / patch {config.patch_size}")
    return 0


def _pretrain(options: argparse.Namespace) -> int:
    from beit3_ds.config import load_run_config

    load_run_config(options.config)  # before the seconds that DeepSpeed takes to import
    from beit3_ds.pretrain import main as pretrain_main

    return pretrain_main([options.config])


def _bench_attention(options: argparse.Namespace) -> int:
    from beit3_ds.benchmarks.attention import benchmark_attention

    print(benchmark_attention())
    return 0


if __name__ == "__main__":
    sys.exit(main())
