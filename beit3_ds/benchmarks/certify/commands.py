"""Runs commands in the repository's root folder, for sections that use the repository's tests or configs."""

import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
"""Root folder of the repository, which contains the package, the tests and the configs."""

_TAIL_LINES = 8


def run_commands(commands: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Runs commands in the repository's root folder until one fails.

    Returns:
        `passed`: whether no command failed. `seconds`: time of all commands. `command`: all commands as text. `tail`:
            last lines of output of the last command that ran.
    """
    start, passed, tail = time.monotonic(), True, ""
    for command in commands:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        output = done.stdout.decode(errors="replace")
        print(f"$ {shlex.join(command)}\n{output}", flush=True)
        passed, tail = done.returncode == 0, "\n".join(output.splitlines()[-_TAIL_LINES:])
        if not passed:
            break
    shown = " && ".join(shlex.join(command) for command in commands)
    return {"passed": passed, "seconds": time.monotonic() - start, "command": shown, "tail": tail}
