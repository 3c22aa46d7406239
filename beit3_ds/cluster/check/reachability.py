"""Finds hosts of a run that cannot be reached over ssh."""

import asyncio
from collections.abc import Iterable

from beit3_ds.cluster.check.node_connection import remote_command

_SECONDS = 15.0  # limit for a host that connects and does not answer
_AT_A_TIME = 64


async def find_unreachable(hosts: Iterable[str]) -> dict[str, str]:
    """Finds hosts that cannot be reached. Runs the command `true` over ssh on every host, at most 64 hosts at a time.

    Each host has 15 seconds to answer.

    Returns:
        The hosts on which the command failed or took too long: one line with the reason, by host name.
    """
    limit = asyncio.Semaphore(_AT_A_TIME)
    names = list(hosts)
    faults = await asyncio.gather(*(_find_fault(name, limit) for name in names))
    return {name: fault for name, fault in zip(names, faults, strict=True) if fault is not None}


async def _find_fault(host: str, limit: asyncio.Semaphore) -> str | None:
    async with limit:
        try:
            ssh = await asyncio.create_subprocess_exec(
                *remote_command(host, ["true"], {}),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except FileNotFoundError:
            return "there is no ssh here"
        try:
            _, errors = await asyncio.wait_for(ssh.communicate(), _SECONDS)
        except TimeoutError:
            ssh.kill()
            await ssh.wait()
            return f"no answer within {_SECONDS:.0f} s"
        except asyncio.CancelledError:
            ssh.kill()
            raise
    if ssh.returncode == 0:
        return None
    lines = errors.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"ssh ended with status {ssh.returncode}"
