"""Implements `beit3 import`, which converts weights and visual tokenizers from other projects."""

import argparse

from beit3_ds.cli.command import Subparsers, add_command
from beit3_ds.config.arguments import integer
from beit3_ds.config.numbers import Range


def add_import_command(subparsers: Subparsers) -> None:
    """Adds the subcommand `import`."""
    summary = (
        "read released BEiT-3 weights, pretrained or fine-tuned, a released visual tokenizer of BEiT v2, or a file "
        "that `export` wrote"
    )
    command = add_command(
        subparsers, "import", _import, summary, details="Code inside the file is never run.", writes_files=True
    )
    command.add_argument(
        "file", help="the released .pth file, or a file that export wrote with --format; the kind of file is detected"
    )
    command.add_argument(
        "out", help="the .safetensors file to write; for a tokenizer, the tokenizers.visual.path of a run"
    )
    command.add_argument(
        "--image-size",
        type=integer(Range(1, 2**18)),
        metavar="PX",
        help="interpolate positions for images of PX pixels; a tokenizer for a patch-14 model at 224 px needs 256",
    )
    command.add_argument(
        "--answers",
        metavar="FILE",
        help="list of answers to keep with the weights of VQAv2: the answer2label.txt of BEiT-3's released code",
    )
    command.add_argument("--force", action="store_true", help="overwrite OUT if it exists")


def _import(options: argparse.Namespace) -> int:
    from pathlib import Path

    from beit3_ds.config import ConfigError
    from beit3_ds.tokenizers import import_released_tokenizer, save_visual_tokenizer
    from beit3_ds.untrusted_file import read_tensors
    from beit3_ds.weights.export import check_free, export_weights
    from beit3_ds.weights.inspection import describe_task
    from beit3_ds.weights.reader import open_for_import
    from beit3_ds.weights.released import ReleasedFile
    from beit3_ds.weights.timm_file import TimmFile

    out = Path(options.out)
    if "quantize.embedding.weight" in read_tensors(options.file):
        check_free(out, options.force)
        tokenizer = import_released_tokenizer(options.file, out, image_size=options.image_size)
        save_visual_tokenizer(out, tokenizer)
        config = tokenizer.config
        print(f"wrote {out}: {config.codebook_size} codes, {config.image_size} px / patch {config.patch_size}")
        return 0
    reader = open_for_import(options.file, image_size=options.image_size)
    if options.answers:
        if not isinstance(reader, ReleasedFile):
            raise ConfigError(
                f"{options.file} holds a vision tower, which has no list of answers. Leave --answers out."
            )
        reader.name_answers(Path(options.answers))
    done = export_weights(reader, out, overwrite=options.force)
    model = reader.model
    task = "" if reader.task is None else f"; head: {describe_task(reader.task)}"
    size = f"{model.num_layers} layers of {model.hidden_size}, {model.image_size} px"
    print(f"wrote {out}: {done.describe()}; {size}{task}")
    if isinstance(reader, TimmFile):
        print(
            f"{options.file} holds a vision tower: {len(reader.held)} tensors. The other "
            f"{len(reader.names()) - len(reader.held)}, language and the masked-modeling heads, have initial values."
        )
    return 0
