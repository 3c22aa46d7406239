"""The `beit3` commands that get weights out and in: export, import, inspect."""

import argparse

from beit3_ds.config.arguments import integer
from beit3_ds.config.numbers import Range


def add_weight_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the three to a parser's group of subcommands."""
    export = commands.add_parser(
        "export",
        help="write a model's weights for one device, for the reference's code, or for timm",
        description="Write a model's weights as plain tensors, one tensor in memory at a time.",
    )
    export.add_argument(
        "checkpoint", help="a checkpoint, a run's output folder (its newest), or weights exported or imported before"
    )
    export.add_argument("out", help="the file to write, or the folder with --max-shard-size")
    export.add_argument(
        "--format",
        choices=("beit3", "unilm-dual", "unilm-fusion", "timm"),
        default="beit3",
        help="beit3 (default): safetensors for BEiT3.from_pretrained; unilm-dual: a .pth of the reference, exact for "
        "images and texts, without vision-language experts for pairs too; unilm-fusion: with vision-language experts, "
        "exact for pairs; timm: safetensors of the vision tower",
    )
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: as stored; checkpoints hold fp32")
    export.add_argument("--max-shard-size", metavar="SIZE", help="write a folder of files of at most SIZE, e.g. 5GB")
    export.set_defaults(run=_export)
    text = "read what others released (BEiT-3 weights, a visual tokenizer of BEiT v2), or what export wrote for others"
    importing = commands.add_parser(
        "import", help=text, description=f"{text[0].upper()}{text[1:]}. Runs no code of it."
    )
    importing.add_argument(
        "file", help="the released .pth file, or one that export wrote with --format; its tensors tell its kind"
    )
    importing.add_argument(
        "out", help="the .safetensors file to write; of a tokenizer: tokenizers.visual.path of a run"
    )
    importing.add_argument(
        "--image-size",
        type=integer(Range(1, 2**18)),
        metavar="PX",
        help="interpolate positions for images of PX pixels; a tokenizer beside a patch-14 model at 224 px needs 256",
    )
    importing.set_defaults(run=_import)
    for command in (export, importing):
        command.add_argument("--force", action="store_true", help="replace what is at OUT")
    text = "print what a checkpoint or a file of weights holds: configuration, parameters of each part, types, sizes"
    inspect = commands.add_parser("inspect", help=text, description=f"{text[0].upper()}{text[1:]}.")
    inspect.add_argument(
        "path", help="a checkpoint, a run's output folder, exported or imported weights, or a released .pth file"
    )
    inspect.add_argument("--tensors", action="store_true", help="list every tensor too")
    inspect.set_defaults(run=_inspect)


# As in cli.py, imports stand inside the commands.


def _export(options: argparse.Namespace) -> int:
    from pathlib import Path

    import torch

    from beit3_ds.weights.export import export_weights, loading_hint, parse_byte_count
    from beit3_ds.weights.source import open_source

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    limit = parse_byte_count(options.max_shard_size) if options.max_shard_size else None
    source, out = open_source(options.checkpoint), Path(options.out)
    done = export_weights(
        source,
        out,
        format=options.format,
        dtype=dtypes.get(options.dtype),
        max_shard_bytes=limit,
        overwrite=options.force,
    )
    print(f"wrote {out}: {done.describe()}")
    print(loading_hint(source.model, out, options.format))
    return 0


def _import(options: argparse.Namespace) -> int:
    from pathlib import Path

    from beit3_ds.tokenizers import import_released_tokenizer, save_visual_tokenizer
    from beit3_ds.untrusted_file import read_tensors
    from beit3_ds.weights.export import check_free, export_weights
    from beit3_ds.weights.source import open_foreign
    from beit3_ds.weights.timm_file import TimmFile

    out = Path(options.out)
    if "quantize.embedding.weight" in read_tensors(options.file):
        check_free(out, options.force)
        tokenizer = import_released_tokenizer(options.file, out, image_size=options.image_size)
        save_visual_tokenizer(out, tokenizer)
        config = tokenizer.config
        print(f"wrote {out}: {config.codebook_size} codes, {config.image_size} px / patch {config.patch_size}")
        return 0
    source = open_foreign(options.file, image_size=options.image_size)
    done = export_weights(source, out, overwrite=options.force)
    model = source.model
    print(f"wrote {out}: {done.describe()}; {model.num_layers} layers of {model.hidden_size}, {model.image_size} px")
    if isinstance(source, TimmFile):
        print(
            f"{options.file} holds a vision tower: {len(source.held)} tensors. The other "
            f"{len(source.names()) - len(source.held)}, language and the masked-modeling heads, have initial values."
        )
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from pathlib import Path

    from beit3_ds.weights.inspection import describe_weights

    print(describe_weights(Path(options.path), every_tensor=options.tensors))
    return 0
