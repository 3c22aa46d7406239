"""Replaces pdsh, ssh, mpirun and srun by programs that start every host's command here, through a shell.

The real pdsh and ssh pass their words to a shell on the hosts; wrappers of mpirun and srun may do so. Here, all words
after the options are joined and read by `sh`. So a word that a shell would change does damage here too.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

PROGRAMS = ("pdsh", "ssh", "mpirun", "srun", "ompi_info", "sinfo")


def install(folder: Path) -> None:
    """Writes the programs into a folder, which tests add to PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in PROGRAMS:
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        (folder / name).chmod(0o755)


def shell_lines(program: str, words: list[str]) -> list[tuple[str, dict[str, str]]]:
    """Returns, per host or rank, the line for `sh` and the variables that the program sets."""
    if program == "pdsh":  # -S -f N -w HOSTS WORDS...
        hosts = words[words.index("-w") + 1].split(",")
        line = " ".join(words[words.index("-w") + 2 :])
        return [(line.replace("%n", str(n)).replace("%h", host), {}) for n, host in enumerate(hosts)]
    if program == "ssh":
        at = 0
        while words[at].startswith("-"):
            at += 2 if words[at] == "-o" else 1
        return [(" ".join(words[at + 1 :]), {})]
    name = "OMPI_COMM_WORLD_RANK" if program == "mpirun" else "SLURM_PROCID"
    count = int(words[words.index("-n") + 1])
    python = next(n for n, word in enumerate(words) if word == "-u") - 1
    exported = [word for word in words[:python] if re.match(r"(--export=)?\w+[=,]", word)]
    line = " ".join(["true", *exported, ";", "exec", *words[python:]])
    mpich = {"PMI_RANK": "{}", "MPI_LOCALRANKID": "{}"} if "-genv" in words or "-ppn" in words else {}
    return [(line, {name: str(n), **{key: str(n) for key in mpich}}) for n in range(count)]


def main() -> int:
    program, words = sys.argv[1], sys.argv[2:]
    if program in ("ompi_info", "sinfo"):
        return 0
    started = [subprocess.Popen(["sh", "-c", line], env=os.environ | own) for line, own in shell_lines(program, words)]
    return max(process.wait() for process in started)


if __name__ == "__main__":
    sys.exit(main())
