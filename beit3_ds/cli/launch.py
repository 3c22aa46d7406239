"""The `beit3` command that trains on the machines of a hostfile."""

import argparse

_EPILOG = """examples:
  beit3 launch hostfiles/localhost ds_configs/quickstart_cpu.json
  beit3 launch hosts ds_configs/giant_zero3_64gpu.json --restarts 5 --min-ranks 32
  beit3 launch hosts ds_configs/base_8gpu.json --launcher openmpi --env NCCL_SOCKET_IFNAME=ib0 --env WANDB_API_KEY

DeepSpeed's launcher starts the ranks; this command supervises them. Each rank's output is in
LOG_DIR/attempt_K/rank_N.log, that of rank 0 is shown here. The first rank that fails is shown with its last lines, and
all others are ended. SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 to this command: the run saves after the step it is in and
stops; a second Ctrl-C kills it. The same command goes on from the newest checkpoint.

exit status: 0 the run is finished; 128 + n signal n stopped it, with a checkpoint; 2 a config or a file needs a change;
1 it failed otherwise.
"""


def add_launch_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds it to a parser's group of subcommands."""
    from beit3_ds.cluster.launch.launcher_command import LAUNCHERS
    from beit3_ds.config.arguments import add_config_arguments, integer, real
    from beit3_ds.config.numbers import RANKS, Range

    text = "pretrain, or resume, on the machines of a hostfile; survives the loss of ranks and machines"
    command = commands.add_parser(
        "launch",
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("hostfile", help="one machine a line: NAME slots=RANKS")
    add_config_arguments(command)
    command.add_argument(
        "--launcher", choices=LAUNCHERS, default="pdsh", help="how ranks are started on other machines (default: pdsh)"
    )
    command.add_argument(
        "--restarts",
        type=integer(Range(0)),
        default=0,
        metavar="N",
        help="after a failure start again from the newest checkpoint, N times at most, without the machines that do "
        "not answer, on the largest number of ranks that the layout allows (default: 0)",
    )
    command.add_argument(
        "--min-ranks",
        type=integer(RANKS),
        default=1,
        metavar="N",
        help="minimum ranks after a restart (default: 1)",
    )
    command.add_argument(
        "--log-dir",
        metavar="DIR",
        help="for logs, on storage that all machines share (default: logs in training.output_dir)",
    )
    command.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="give the ranks this variable too (repeatable); those of NCCL, torch, DeepSpeed, Python, OpenMP and the "
        "paths of programs and libraries are forwarded anyway",
    )
    command.add_argument(
        "--keepalive",
        type=real(Range(3, 24 * 3600)),
        default=15.0,
        metavar="SECONDS",
        help="silence after which a machine is lost, and after which ranks end that have lost this command "
        "(default: 15)",
    )
    command.add_argument(
        "--start-timeout",
        type=real(Range(1, 24 * 3600)),
        default=180.0,
        metavar="SECONDS",
        help="seconds to wait for all machines (default: 180)",
    )
    command.add_argument(
        "--port",
        type=integer(Range(0, 65535)),
        default=0,
        metavar="N",
        help="port of this machine, to which the others connect (default: any)",
    )
    command.set_defaults(run=_launch)


def _launch(options: argparse.Namespace) -> int:
    from beit3_ds.cluster.launch.launching import LaunchOptions, launch

    return launch(
        LaunchOptions(
            hostfile=options.hostfile,
            config=options.config,
            changes=options.set,
            launcher=options.launcher,
            restarts=options.restarts,
            smallest=options.min_ranks,
            log_dir=options.log_dir,
            environment=options.env,
            keepalive_seconds=options.keepalive,
            start_seconds=options.start_timeout,
            port=options.port,
        )
    )
