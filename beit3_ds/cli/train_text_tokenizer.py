"""Implements `beit3 train-text-tokenizer`, which trains the SentencePiece model of a run."""

import argparse

from beit3_ds.cli.command import Subparsers, add_command
from beit3_ds.config import ConfigError
from beit3_ds.config.arguments import add_config_arguments, add_force_argument


def add_train_text_tokenizer_command(subparsers: Subparsers) -> None:
    """Adds the subcommand `train-text-tokenizer`."""
    summary = "train the run's SentencePiece model on its texts and captions"
    command = add_command(subparsers, "train-text-tokenizer", _train_text_tokenizer, summary, writes_files=True)
    add_config_arguments(command)
    add_force_argument(command, "retrain the tokenizer and overwrite it if it exists")


def _train_text_tokenizer(options: argparse.Namespace) -> int:
    from pathlib import Path

    from beit3_ds.atomic_file import bounded_name
    from beit3_ds.config import load_run_config
    from beit3_ds.data import read_training_lines
    from beit3_ds.storage_error import StorageError
    from beit3_ds.tokenizers import TextTokenizer
    from beit3_ds.tokenizers.recipe import (
        check_can_be_written,
        describe_trained,
        is_trained,
        save_with_recipe,
        text_recipe,
    )
    from beit3_ds.tokenizers.text import train_sentencepiece_model
    from beit3_ds.writer_lock import WriterLock

    config = load_run_config(options.config, options.set)
    path, recipe = config.tokenizers.text.path, text_recipe(config)
    if not path:
        raise ConfigError("tokenizers.text.path is not set: a run without texts and pairs needs no text tokenizer.")

    def read_known() -> dict[str, int]:
        return {"vocab_size": TextTokenizer(path).num_pieces}

    def is_done() -> bool:
        return not options.force and is_trained("tokenizers.text", path, recipe, read_known)

    if is_done():  # checked before locking, because the folder may be read-only
        print(describe_trained("tokenizers.text", path))
        return 0
    check_can_be_written("tokenizers.text", path)
    lock_path = Path(path).with_name(f"{bounded_name(Path(path).name)}.lock")
    with WriterLock(lock_path, f"tokenizers.text.path={path}", "name another file"):
        if is_done():  # another process has just trained it
            print(describe_trained("tokenizers.text", path))
            return 0
        lines = read_training_lines(config.data)
        model = train_sentencepiece_model(config.tokenizers.text, lines, config.training.seed)
        try:
            save_with_recipe(path, model, recipe)
        except OSError as error:
            raise StorageError(
                f"tokenizers.text.path={path} cannot be written: {error}. Make room or fix the folder, then start the "
                "same command again."
            ) from error
    tokenizer = TextTokenizer(path)
    print(f"wrote {path}: {tokenizer.vocab_size} ids, <mask> is {tokenizer.mask_id}")
    return 0
