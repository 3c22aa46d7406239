"""Implements `beit3 compile-kernels`, which compiles the kernels for a config into Triton's cache, without a GPU."""

import argparse

from beit3_ds.cli.command import Subparsers, add_command
from beit3_ds.config.arguments import add_config_arguments

ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
"""Maps names of GPU architectures to compute capabilities."""


def add_compile_kernels_command(subparsers: Subparsers) -> None:
    """Adds the subcommand `compile-kernels`."""
    summary = "compile a run's GPU kernels ahead of time; no GPU is needed"
    details = "With these kernels in TRITON_CACHE_DIR, ranks start in seconds instead of minutes."
    command = add_command(subparsers, "compile-kernels", _compile_kernels, summary, details=details, writes_files=True)
    add_config_arguments(command)
    command.add_argument(
        "--architecture",
        choices=ARCHITECTURES,
        default="sm_90",
        help="sm_80 for A100, sm_90 for H100 and H200, sm_100 for B200 (default: sm_90)",
    )
    command.add_argument(
        "--cache", metavar="DIR", help="folder of the cache (default: TRITON_CACHE_DIR, or ~/.triton/cache)"
    )


def _compile_kernels(options: argparse.Namespace) -> int:
    from pathlib import Path

    from beit3_ds.config import load_run_config

    config = load_run_config(options.config, options.set)
    from beit3_ds.training.kernel_cache import fill_cache

    def report(name: str, seconds: float) -> None:
        print(f"{seconds:5.1f} s  {name}", flush=True)

    folder = None if options.cache is None else Path(options.cache)
    filled = fill_cache(config, ARCHITECTURES[options.architecture], folder, report)
    print(
        f"{filled.num_kernels} kernels for {options.architecture}: {filled.num_compiled} compiled, the others were in "
        f"the cache; {filled.seconds:.0f} s, {filled.num_bytes / 2**20:.1f} MiB in {filled.folder}"
    )
    return 0
