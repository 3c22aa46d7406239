"""The `beit3` commands that measure: bench, certify."""

import argparse

from beit3_ds.config.arguments import integer, real
from beit3_ds.config.numbers import PROCESSES, Range


def add_bench_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds both to a parser's group of subcommands."""
    bench = commands.add_parser("bench", help="measure a choice that was made by measurement")
    benches = bench.add_subparsers(metavar="WHAT", required=True)
    attention = benches.add_parser("attention", help="ways to batch ragged sequences inside attention, on this device")
    attention.set_defaults(run=_bench_attention)
    data = benches.add_parser("data", help="file calls per sample; speed of this loader, WebDataset and ImageFolder")
    data.add_argument("--calls-only", action="store_true", help="only count opens and reads per sample")
    data.add_argument(
        "--shards", type=integer(Range(2, 100_000)), metavar="N", help="only time the opening of N prepared shards"
    )
    data.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    data.set_defaults(run=_bench_data)
    texts = benches.add_parser("text", help="preparing texts beside SentencePiece's own batch encoding, and its memory")
    texts.add_argument(
        "--gigabytes", type=real(Range(0, 1e6)), default=0, metavar="G", help="prepare G GB and watch its memory"
    )
    texts.add_argument(
        "--processes", type=integer(PROCESSES), metavar="P", help="processes for --gigabytes (default: one per core)"
    )
    texts.add_argument("--json", metavar="FILE", help="write rows and summary there")
    texts.set_defaults(run=_bench_text)
    kernels = benches.add_parser(
        "kernels",
        help="every op beside its baselines: time, rate, share of what the device reaches, memory",
        description="Every op beside its baselines, forward and backward. On a CPU, the forms that CPUs get.",
    )
    kernels.add_argument(
        "--size", nargs="+", metavar="SIZE", help="of the model (default: base, with a GPU also giant)"
    )
    kernels.add_argument(
        "--samples", type=integer(Range(1, 2**24)), metavar="N", help="samples per stream (default: 4, with a GPU 16)"
    )
    kernels.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: fp32, with a GPU bf16")
    kernels.add_argument(
        "--model", metavar="GPU", help="add a column of times that this GPU's peak rates allow at best: modelled"
    )
    kernels.add_argument("--csv", metavar="FILE", help="also write all figures, with device and versions, to FILE")
    kernels.set_defaults(run=_bench_kernels)
    precision = benches.add_parser(
        "precision", help="error of bf16 gradients: bf16 or fp32 residual stream, bf16 or fp32 sums of micro-batches"
    )
    precision.add_argument(
        "--layers", type=integer(Range(3, 1000)), default=40, metavar="N", help="blocks of the model (default: 40)"
    )
    precision.add_argument(
        "--width", type=integer(Range(4, 2**16)), default=64, metavar="D", help="width of the stream (default: 64)"
    )
    precision.add_argument(
        "--micro-batches",
        type=integer(Range(1, 2**20)),
        default=32,
        metavar="N",
        help="micro-batches per step (default: 32)",
    )
    precision.set_defaults(run=_bench_precision)
    parallel = benches.add_parser(
        "parallel", help="a step on two ranks of one thread beside one process of two threads, and where the rest goes"
    )
    parallel.add_argument("--json", metavar="FILE", help="write rows and summary there")
    parallel.set_defaults(run=_bench_parallel)
    train = benches.add_parser(
        "train", help="a training step beside torchscale's BEiT-3 on the same batches: speed, memory, share of products"
    )
    train.add_argument("--size", default="base", metavar="SIZE", help="of the model (default: base)")
    train.add_argument(
        "--samples", type=integer(Range(1, 2**24)), default=4, metavar="N", help="samples per stream (default: 4)"
    )
    train.add_argument("--rounds", type=integer(Range(1)), default=7, metavar="N", help="measured rounds (default: 7)")
    train.add_argument(
        "--to-longest",
        action="store_true",
        help="let the reference pad texts to the longest of a batch, not to the data's limit as its users' code does",
    )
    train.add_argument("--json", metavar="FILE", help="write rows and summary there")
    train.set_defaults(run=_bench_train)
    checkpoint = benches.add_parser("checkpoint", help="saving, loading and exporting beside DeepSpeed's own ways")
    checkpoint.add_argument("--size", metavar="SIZE", help="of the model (default: the largest that fits this machine)")
    checkpoint.add_argument("--ranks", type=integer(PROCESSES), default=2, metavar="N", help="processes (default: 2)")
    checkpoint.add_argument("--folder", metavar="DIR", help="for its files, deleted at the end (default: here)")
    checkpoint.add_argument("--json", metavar="FILE", help="write rows and summary there")
    checkpoint.set_defaults(run=_bench_checkpoint)
    text = "test the kernels, a step and a layout on this machine's GPUs, measure them, and write one report"
    certify = commands.add_parser("certify", help=text, description=f"{text[0].upper()}{text[1:]}.")
    certify.add_argument("--out", default="certificate", metavar="DIR", help="of the report (default: certificate)")
    certify.add_argument("--only", nargs="+", default=[], metavar="PART", help="steps whose names contain one of these")
    certify.set_defaults(run=_certify)


def _bench_attention(options: argparse.Namespace) -> int:
    from beit3_ds.benchmarks.kernels.attention import benchmark_attention

    print(benchmark_attention())
    return 0


def _bench_data(options: argparse.Namespace) -> int:
    from beit3_ds.benchmarks.data.files import count_calls, describe_calls, time_opening

    if options.shards is not None:
        print(time_opening(options.shards))
        return 0
    print(describe_calls(count_calls()))
    if not options.calls_only:
        from beit3_ds.benchmarks.data.benchmark import benchmark_data

        print()
        print(benchmark_data(options.json))
    return 0


def _bench_text(options: argparse.Namespace) -> int:
    from beit3_ds.benchmarks.data.text import benchmark_text

    print(benchmark_text(int(options.gigabytes * 1e9), options.processes, options.json))
    return 0


def _bench_kernels(options: argparse.Namespace) -> int:
    import torch

    from beit3_ds.benchmarks.kernels.benchmark import benchmark_kernels

    has_gpu = torch.cuda.is_available()
    samples = options.samples if options.samples is not None else 16 if has_gpu else 4
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes[options.dtype or ("bf16" if has_gpu else "fp32")]
    sizes = options.size or (["base", "giant"] if has_gpu else ["base"])
    print(benchmark_kernels(sizes, samples, dtype, options.model, options.csv))
    return 0


def _bench_precision(options: argparse.Namespace) -> int:
    from beit3_ds.benchmarks.precision import benchmark_precision

    print(benchmark_precision(options.layers, options.width, options.micro_batches))
    return 0


def _bench_parallel(options: argparse.Namespace) -> int:
    from beit3_ds.benchmarks.step.parallel import benchmark_parallel

    print(benchmark_parallel(options.json))
    return 0


def _bench_train(options: argparse.Namespace) -> int:
    from beit3_ds.benchmarks.step.benchmark import benchmark_train

    print(benchmark_train(options.size, options.samples, options.rounds, options.json, options.to_longest))
    return 0


def _bench_checkpoint(options: argparse.Namespace) -> int:
    from beit3_ds.benchmarks.checkpoint.benchmark import benchmark_checkpoint

    print(benchmark_checkpoint(options.size, options.ranks, options.folder, options.json))
    return 0


def _certify(options: argparse.Namespace) -> int:
    from pathlib import Path

    from beit3_ds.benchmarks.certify.certificate import certify

    return certify(Path(options.out), only=options.only)
