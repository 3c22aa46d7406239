"""Implements `beit3 launch`, which trains on the machines of a hostfile and supervises the ranks."""

import argparse

from beit3_ds.cli.command import Subparsers, add_command
from beit3_ds.cluster.launch.launcher_command import LAUNCHERS
from beit3_ds.config.arguments import add_config_arguments, add_force_argument, integer, real
from beit3_ds.config.numbers import RANKS, Range

_EPILOG = """examples:
  beit3 launch hostfiles/localhost ds_configs/quickstart_cpu.json
  beit3 launch hosts ds_configs/giant_zero3_64gpu.json --restarts 5 --min-ranks 32
  beit3 launch hosts ds_configs/base_8gpu.json --launcher openmpi --env NCCL_SOCKET_IFNAME=ib0 --env WANDB_API_KEY

DeepSpeed's launcher starts the ranks; this command supervises them. It writes each rank's output to
LOG_DIR/attempt_K/rank_N.log, where K counts the first start and the restarts, and shows the output of rank 0. When a
rank fails, it shows the last lines of that rank and ends all others. On SIGTERM, SIGINT (Ctrl-C), SIGUSR1 or SIGHUP the
run finishes its step, saves and stops; a second Ctrl-C kills it. The same command resumes from the newest checkpoint.

exit status:
  0        the run is finished
  128 + n  signal n stopped the run, with a checkpoint
  2        a config or a file needs a change
  1        the run failed otherwise
"""


def add_launch_command(subparsers: Subparsers) -> None:
    """Adds the subcommand `launch`."""
    summary = (
        "train on the machines of a hostfile, or resume; with --restarts, continue after the loss of ranks and machines"
    )
    command = add_command(subparsers, "launch", _launch, summary, epilog=_EPILOG, writes_files=True)
    command.add_argument("hostfile", help="one machine per line: NAME slots=RANKS")
    add_config_arguments(command)
    add_force_argument(command, "train again if the run is finished; its checkpoints are moved aside")
    command.add_argument(
        "--launcher",
        choices=LAUNCHERS,
        default="pdsh",
        help="program that starts ranks on other machines (default: pdsh)",
    )
    command.add_argument(
        "--log-dir",
        metavar="DIR",
        help="folder for logs, on storage that all machines share (default: logs in training.output_dir)",
    )
    command.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="also forward this variable to the ranks (repeatable); a fixed list of variables is always forwarded, for "
        "NCCL, torch, DeepSpeed, Python and OpenMP, and has no password or API key (--dry-run shows the list)",
    )
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="show which ranks would start on which machine, with which variables; start nothing",
    )
    command.add_argument(
        "--port",
        type=integer(Range(0, 65535)),
        default=0,
        metavar="N",
        help="port of this machine to which the other machines connect (default: any)",
    )
    _add_failure_arguments(command)


def _add_failure_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--restarts",
        type=integer(Range(0)),
        default=0,
        metavar="N",
        help="after a failure, resume from the newest checkpoint at most N times, without the machines that do not "
        "answer, on the largest number of ranks that the layout allows (default: 0)",
    )
    command.add_argument(
        "--min-ranks", type=integer(RANKS), default=1, metavar="N", help="minimum ranks after a restart (default: 1)"
    )
    command.add_argument(
        "--keepalive",
        type=real(Range(3, 24 * 3600)),
        default=15.0,
        metavar="SECONDS",
        help="seconds of silence after which a machine counts as lost; after the same time without contact to this "
        "command, ranks end themselves (default: 15)",
    )
    command.add_argument(
        "--start-timeout",
        type=real(Range(1, 24 * 3600)),
        default=180.0,
        metavar="SECONDS",
        help="seconds to wait for all machines (default: 180)",
    )


def _launch(options: argparse.Namespace) -> int:
    from beit3_ds.cluster.launch.launching import LaunchOptions, launch

    return launch(
        LaunchOptions(
            hostfile=options.hostfile,
            config=options.config,
            changes=options.set,
            launcher=options.launcher,
            restarts=options.restarts,
            min_ranks=options.min_ranks,
            log_dir=options.log_dir,
            environment=options.env,
            keepalive_seconds=options.keepalive,
            start_seconds=options.start_timeout,
            port=options.port,
            force=options.force,
            dry_run=options.dry_run,
        )
    )
