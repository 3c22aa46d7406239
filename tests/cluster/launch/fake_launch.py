"""Runs `beit3 launch` with a fake launcher and fake trainers, and without ssh.

The argument is a JSON object with fields of `LaunchOptions`. All hosts are this machine. The file `unreachable` beside
the hostfile names hosts that shall count as unreachable. Waiting times are short.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from beit3_ds.cluster.launch import attempt, guarded_rank, launching
from beit3_ds.cluster.launch.launching import LaunchOptions, launch
from beit3_ds.config import ConfigError

values = json.loads(sys.argv[1])
unreachable_file = Path(values["hostfile"]).with_name("unreachable")


async def find_unreachable(names: Iterable[str]) -> dict[str, str]:
    found = unreachable_file.read_text().split() if unreachable_file.exists() else []
    return {name: "no route to host" for name in names if name in found}


def fake_launcher(launcher: str, hostfile: launching.Hostfile, guard: list[str]) -> list[list[str]]:
    return [
        [sys.executable, "-m", "tests.cluster.launch.fake_launcher", str(hostfile.path), *guard, values["hostfile"]]
    ]


guarded_rank.STOPPED_SECONDS = 1.0
attempt._GRACE_SECONDS = 1.0
attempt._LAUNCHER_SECONDS = 2.0
launching._RESTART_SECONDS = 0.2
launching.find_unreachable = find_unreachable
launching.build_commands = fake_launcher
launching._own_address = lambda hosts, hostfile: "127.0.0.1"
defaults = {
    "changes": [],
    "launcher": "ssh",
    "restarts": 0,
    "min_ranks": 1,
    "log_dir": None,
    "environment": [],
    "keepalive_seconds": 3.0,
    "start_seconds": 60.0,
    "port": 0,
    "module": "tests.cluster.launch.fake_trainer",
}
try:
    sys.exit(launch(LaunchOptions(**{**defaults, **values})))
except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
