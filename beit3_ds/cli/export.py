"""Implements `beit3 export`, which writes a model's weights as plain tensors."""

import argparse

from beit3_ds.cli.command import Subparsers, add_command


def add_export_command(subparsers: Subparsers) -> None:
    """Adds the subcommand `export`."""
    summary = "write a model's weights for one device, for BEiT-3's released code, or for timm"
    command = add_command(
        subparsers,
        "export",
        _export,
        summary,
        details="At most one tensor is in memory at a time.",
        writes_files=True,
    )
    command.add_argument(
        "checkpoint",
        help="a checkpoint, a run's output folder (its newest checkpoint is taken), or exported or imported weights",
    )
    command.add_argument("out", help="the file to write; with --max-shard-size, the folder")
    command.add_argument(
        "--format",
        choices=("beit3", "unilm-dual", "unilm-fusion", "timm"),
        default="beit3",
        help="beit3 (default): safetensors for BEiT3.from_pretrained; unilm-dual: a .pth for BEiT-3's released code, "
        "exact for images and texts, and for pairs of a model without vision-language experts; unilm-fusion: a .pth "
        "with the vision-language experts, exact for pairs; timm: safetensors of the vision tower",
    )
    command.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: as stored; checkpoints hold fp32")
    command.add_argument("--max-shard-size", metavar="SIZE", help="write a folder of files of at most SIZE, e.g. 5GB")
    command.add_argument(
        "--ema",
        action="store_true",
        help="write the moving average of the weights instead of the weights (training.ema_decay)",
    )
    command.add_argument(
        "--no-heads", action="store_true", help="leave out the head of the task, for a run of another task"
    )
    command.add_argument(
        "--leave-out",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out tensors of the head by name, such as 'heads.boxes.stages.*.classes.*' for a run of the same "
        "task with other classes; may be given several times",
    )
    command.add_argument(
        "--best",
        action="store_true",
        help="export the best checkpoint of a run instead of the newest (training.best_metric)",
    )
    command.add_argument("--force", action="store_true", help="overwrite OUT if it exists")


def _export(options: argparse.Namespace) -> int:
    from pathlib import Path

    import torch

    from beit3_ds.weights.export import export_weights, loading_hint, parse_byte_count
    from beit3_ds.weights.reader import Backbone, WeightReader, WithoutTensors, open_weights

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    limit = parse_byte_count(options.max_shard_size) if options.max_shard_size else None
    opened, out = open_weights(options.checkpoint, averages=options.ema, best=options.best), Path(options.out)
    reader: WeightReader = Backbone(opened) if options.no_heads else opened
    if options.leave_out:
        reader = WithoutTensors(reader, options.leave_out)
    done = export_weights(
        reader,
        out,
        format=options.format,
        dtype=dtypes.get(options.dtype),
        max_shard_bytes=limit,
        overwrite=options.force,
    )
    print(f"wrote {out}: {done.describe()}")
    print(loading_hint(reader.model, out, options.format))
    return 0
