"""Implements `beit3 bench`, which measures speed, memory or precision, and compares the results with baselines."""

import argparse

from beit3_ds.cli.command import Subparsers, add_command
from beit3_ds.config.arguments import integer, real
from beit3_ds.config.numbers import PROCESSES, Range


def add_bench_command(subparsers: Subparsers) -> None:
    """Adds the subcommand `bench`, with one subcommand per benchmark."""
    bench = subparsers.add_parser("bench", help="measure speed, memory or precision beside a baseline")
    benches = bench.add_subparsers(metavar="WHAT", required=True)
    add_command(benches, "attention", _run_attention, "compare ways to batch sequences of unequal lengths in attention")
    _add_data(benches)
    _add_text(benches)
    _add_kernels(benches)
    _add_host(benches)
    _add_precision(benches)
    _add_parallel(benches)
    _add_train(benches)
    _add_finetune(benches)
    _add_checkpoint(benches)
    _add_dense(benches)
    _add_model_step(benches)
    _add_checkpoint_index(benches)


def _add_data(benches: Subparsers) -> None:
    summary = "count file calls per sample, and compare this loader's speed with WebDataset and ImageFolder"
    data = add_command(benches, "data", _run_data, summary)
    data.add_argument("--calls-only", action="store_true", help="only count opens and reads per sample")
    data.add_argument(
        "--shards", type=integer(Range(2, 100_000)), metavar="N", help="only time the opening of N prepared shards"
    )
    _add_json_argument(data)


def _add_text(benches: Subparsers) -> None:
    summary = "compare the preparation of texts with SentencePiece's batch encoding, and measure its memory"
    text = add_command(benches, "text", _run_text, summary)
    text.add_argument(
        "--gigabytes",
        type=real(Range(0, 1e6)),
        default=0,
        metavar="G",
        help="also prepare G GB and measure memory while doing so",
    )
    text.add_argument(
        "--processes", type=integer(PROCESSES), metavar="P", help="processes for --gigabytes (default: one per core)"
    )
    _add_json_argument(text)


def _add_kernels(benches: Subparsers) -> None:
    summary = "compare every op with its baselines: time, rate, share of the device's peak, memory"
    details = "Measures forward and backward; on a CPU, measures the CPU implementations."
    kernels = add_command(benches, "kernels", _run_kernels, summary, details=details)
    kernels.add_argument(
        "--size", nargs="+", metavar="SIZE", help="sizes of the model (default: base; on a GPU base and giant)"
    )
    kernels.add_argument(
        "--samples",
        type=integer(Range(1, 2**24)),
        metavar="N",
        help="samples of each kind: images, pairs and texts (default: 4; on a GPU 16)",
    )
    kernels.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: fp32; on a GPU bf16")
    kernels.add_argument(
        "--roofline",
        metavar="GPU",
        help="add a column with the modelled minimum times at the peak rates of this GPU, e.g. h100-sxm",
    )
    kernels.add_argument("--csv", metavar="FILE", help="also write all figures, with device and versions, to FILE")


def _add_host(benches: Subparsers) -> None:
    summary = "measure the time that Python needs to launch a layer's kernels, and the cost of ZeRO-3's hooks"
    details = "No GPU is needed: launches do nothing (docs/kernels.md)."
    host = add_command(benches, "host", _run_host, summary, details=details)
    host.add_argument("--rounds", type=integer(Range(1)), default=15, metavar="N", help="measured rounds (default: 15)")
    _add_json_argument(host)


def _add_precision(benches: Subparsers) -> None:
    summary = "measure the error of bf16 gradients, with the residual stream and gradient sums in bf16 or fp32"
    precision = add_command(benches, "precision", _run_precision, summary)
    precision.add_argument(
        "--layers", type=integer(Range(3, 1000)), default=40, metavar="N", help="blocks of the model (default: 40)"
    )
    precision.add_argument(
        "--width", type=integer(Range(4, 2**16)), default=64, metavar="D", help="hidden size (default: 64)"
    )
    precision.add_argument(
        "--micro-batches",
        type=integer(Range(1, 2**20)),
        default=32,
        metavar="N",
        help="micro-batches per step (default: 32)",
    )


def _add_parallel(benches: Subparsers) -> None:
    summary = "compare a step on two ranks with one thread each and on one process with two threads"
    _add_json_argument(add_command(benches, "parallel", _run_parallel, summary))


def _add_train(benches: Subparsers) -> None:
    summary = (
        "compare a training step with torchscale's BEiT-3 on the same batches: speed, memory, share of matrix products"
    )
    train = add_command(benches, "train", _run_train, summary)
    train.add_argument("--size", default="base", metavar="SIZE", help="size of the model (default: base)")
    train.add_argument(
        "--samples",
        type=integer(Range(1, 2**24)),
        default=4,
        metavar="N",
        help="samples of each kind: images, pairs and texts (default: 4)",
    )
    train.add_argument("--rounds", type=integer(Range(1)), default=7, metavar="N", help="measured rounds (default: 7)")
    train.add_argument(
        "--to-longest",
        action="store_true",
        help="for torchscale, pad texts only to the longest text in a batch (default: to the maximum text length)",
    )
    _add_json_argument(train)


def _add_finetune(benches: Subparsers) -> None:
    summary = "compare fine-tuning steps and caption generation with torchscale's BEiT-3 on the same samples"
    details = "Image sizes are those of BEiT-3's released code: 480 px for VQAv2 and captions, 384 px for retrieval."
    finetune = add_command(benches, "finetune", _run_finetune, summary, details=details)
    finetune.add_argument("--size", default="base", metavar="SIZE", help="size of the model (default: base)")
    finetune.add_argument(
        "--samples", type=integer(Range(1, 2**24)), default=4, metavar="N", help="samples per step (default: 4)"
    )
    finetune.add_argument(
        "--rounds", type=integer(Range(1)), default=7, metavar="N", help="measured rounds of a step (default: 7)"
    )
    finetune.add_argument(
        "--image-size",
        type=integer(Range(1, 2**18)),
        metavar="PX",
        help="size of all images in pixels (default: as in the recipes)",
    )
    finetune.add_argument(
        "--tasks",
        nargs="+",
        choices=("vqa", "retrieval", "captioning", "decoding"),
        default=["vqa", "retrieval", "captioning", "decoding"],
        metavar="TASK",
        help="only some of vqa, retrieval, captioning and decoding",
    )
    _add_json_argument(finetune)


def _add_checkpoint(benches: Subparsers) -> None:
    summary = "compare saving, loading and exporting with DeepSpeed's own functions"
    checkpoint = add_command(benches, "checkpoint", _run_checkpoint, summary)
    checkpoint.add_argument(
        "--size", metavar="SIZE", help="size of the model (default: the largest that fits into memory and on the disk)"
    )
    checkpoint.add_argument("--ranks", type=integer(PROCESSES), default=2, metavar="N", help="processes (default: 2)")
    checkpoint.add_argument("--folder", metavar="DIR", help="folder for temporary files (default: the current folder)")
    _add_json_argument(checkpoint)


def _add_model_step(benches: Subparsers) -> None:
    summary = "print modelled GPU times of ops and steps, before and after the work on the kernels"
    details = "Nothing runs: the times follow from rates that the report states."
    model_step = add_command(benches, "model-step", _run_model_step, summary, details=details)
    model_step.add_argument(
        "--config-dir", default="ds_configs", metavar="DIR", help="folder of the configurations (default: ds_configs)"
    )


def _add_checkpoint_index(benches: Subparsers) -> None:
    summary = "measure the main rank's work on the index of a checkpoint that many ranks wrote"
    index = add_command(benches, "checkpoint-index", _run_checkpoint_index, summary)
    index.add_argument("--size", default="giant", metavar="SIZE", help="size of the model (default: giant)")
    index.add_argument(
        "--ranks", type=integer(Range(1, 99_999)), default=512, metavar="N", help="synthetic ranks (default: 512)"
    )
    _add_json_argument(index)


def _add_dense(benches: Subparsers) -> None:
    summary = "compare detection, segmentation, COCO's evaluation and window attention with other implementations"
    dense = add_command(benches, "dense", _run_dense, summary)
    parts = ("windows", "coco_eval", "detection", "segmentation")
    dense.add_argument(
        "--parts", nargs="+", choices=parts, default=parts, metavar="PART", help=f"only some of {', '.join(parts)}"
    )
    dense.add_argument("--rounds", type=integer(Range(1)), default=5, metavar="N", help="measured rounds (default: 5)")
    _add_json_argument(dense)


def _add_json_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", metavar="FILE", help="also write the figures to FILE")


def _run_attention(options: argparse.Namespace) -> int:
    from beit3_ds.benchmarks.kernels.attention import benchmark_attention

    print(benchmark_attention())
    return 0


def _run_data(options: argparse.Namespace) -> int:
    from beit3_ds.benchmarks.data.call_counts import count_calls, describe_calls, time_opening

    if options.shards is not None:
        print(time_opening(options.shards))
        return 0
    print(describe_calls(count_calls()))
    if not options.calls_only:
        from beit3_ds.benchmarks.data.loaders import benchmark_data

        print()
        print(benchmark_data(options.json))
    return 0


def _run_text(options: argparse.Namespace) -> int:
    from beit3_ds.benchmarks.data.text import benchmark_text

    print(benchmark_text(int(options.gigabytes * 1e9), options.processes, options.json))
    return 0


def _run_kernels(options: argparse.Namespace) -> int:
    import torch

    from beit3_ds.benchmarks.kernels.benchmark import benchmark_kernels

    has_gpu = torch.cuda.is_available()
    samples = options.samples if options.samples is not None else 16 if has_gpu else 4
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes[options.dtype or ("bf16" if has_gpu else "fp32")]
    sizes = options.size or (["base", "giant"] if has_gpu else ["base"])
    print(benchmark_kernels(sizes, samples, dtype, options.roofline, options.csv))
    return 0


def _run_host(options: argparse.Namespace) -> int:
    from beit3_ds.benchmarks.host.benchmark import benchmark_host

    print(benchmark_host(options.rounds, options.json))
    return 0


def _run_precision(options: argparse.Namespace) -> int:
    from beit3_ds.benchmarks.precision import benchmark_precision

    print(benchmark_precision(options.layers, options.width, options.micro_batches))
    return 0


def _run_parallel(options: argparse.Namespace) -> int:
    from beit3_ds.benchmarks.step.parallel import benchmark_parallel

    print(benchmark_parallel(options.json))
    return 0


def _run_train(options: argparse.Namespace) -> int:
    from beit3_ds.benchmarks.step.benchmark import benchmark_train

    print(benchmark_train(options.size, options.samples, options.rounds, options.json, options.to_longest))
    return 0


def _run_finetune(options: argparse.Namespace) -> int:
    from beit3_ds.benchmarks.finetune.benchmark import benchmark_finetune

    print(
        benchmark_finetune(
            options.size, options.samples, options.rounds, options.image_size, options.tasks, options.json
        )
    )
    return 0


def _run_checkpoint(options: argparse.Namespace) -> int:
    from beit3_ds.benchmarks.checkpoint.benchmark import benchmark_checkpoint

    print(benchmark_checkpoint(options.size, options.ranks, options.folder, options.json))
    return 0


def _run_model_step(options: argparse.Namespace) -> int:
    from pathlib import Path

    from beit3_ds.benchmarks.modelled.report import describe_modelled

    print(describe_modelled(Path(options.config_dir)))
    return 0


def _run_checkpoint_index(options: argparse.Namespace) -> int:
    from beit3_ds.benchmarks.checkpoint.index import benchmark_index

    print(benchmark_index(options.ranks, options.size, options.json))
    return 0


def _run_dense(options: argparse.Namespace) -> int:
    from beit3_ds.benchmarks.dense.benchmark import benchmark_dense

    print(benchmark_dense(options.parts, options.rounds, options.json))
    return 0
