"""Tests queries to a node: answers, missing answers and processes left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.cluster.check import probe
from beit3_ds.cluster.check.node_connection import NoAnswer, NodeConnection, remote_command


async def _ask(question: str, seconds: float = 30.0, program: Path = Path(probe.__file__), **arguments: Any) -> Any:
    connection = NodeConnection("localhost", {}, program)
    try:
        await connection.start()
        return await connection.ask(question, seconds, **arguments)
    finally:
        await connection.close()


def test_a_question_that_takes_too_long_is_named(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(NoAnswer, match=r"did not answer 'read_tokens' within 1 s; it printed nothing"):
        asyncio.run(_ask("read_tokens", 1, paths=[str(tmp_path / "none")], patience=1000))
    assert time.monotonic() - begin < 30


def test_errors_and_ends_are_told_with_the_last_words(tmp_path: Path) -> None:
    with pytest.raises(NoAnswer, match="could not answer 'disk': TypeError"):
        asyncio.run(_ask("disk", folder=3))
    (program := tmp_path / "program.py").write_text(
        "import sys; sys.stderr.write('words\\n\\nthe last\\n'); sys.exit(3)"
    )
    with pytest.raises(NoAnswer, match="ended with status 3; its last line: 'the last'"):
        asyncio.run(_ask("clock", program=program))


def test_what_a_login_shell_prints_is_passed_over(tmp_path: Path) -> None:
    source = Path(probe.__file__).read_text()
    (program := tmp_path / "program.py").write_text(
        f"print('welcome'); print('beit3')\n{source}".replace("from __future__ import annotations", "")
    )
    assert abs(asyncio.run(_ask("clock", program=program)) - time.time()) < 60


def test_ssh_is_never_asked_to_wait_or_ask() -> None:
    command = remote_command("node1", ["/a b/python", "-c", "print('x')"], {"PYTHONPATH": "/c d"})
    assert command[0] == "ssh" and "-oBatchMode=yes" in command and "-oConnectTimeout=5" in command
    # The shell on the other side takes it apart again.
    words = subprocess.run(
        ["sh", "-c", command[-1].replace("exec env", "printf '%s\\n'")], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert words == ["PYTHONPATH=/c d", "/a b/python", "-c", "print('x')"]
    assert remote_command("localhost", ["true"], {}) == ["env", "true"]


def test_a_probe_ends_and_deletes_its_files_when_the_asking_side_dies(tmp_path: Path) -> None:
    token = tmp_path / "token"
    program = (
        "import asyncio, sys\n"
        "from beit3_ds.cluster.check.node_connection import NodeConnection\n"
        "async def main():\n"
        "    connection = NodeConnection('localhost', {})\n"
        "    await connection.start()\n"
        f"    answer = await connection.ask('write_token', path={str(token)!r}, token='x')\n"
        "    print(answer, connection._process.pid, flush=True)\n"
        "    await asyncio.sleep(1000)\n"
        "asyncio.run(main())\n"
    )
    asking = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert asking.stdout is not None
    answer, pid = asking.stdout.readline().split()
    assert answer == "None" and token.read_text() == "x"
    os.kill(asking.pid, signal.SIGKILL)
    asking.communicate()
    deadline = time.monotonic() + 60
    while token.exists() or Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the probe outlives the asking side"
        time.sleep(0.02)
