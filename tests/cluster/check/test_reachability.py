"""Tests that all hosts that do not answer over ssh are reported together, with the reasons."""

import asyncio
from pathlib import Path

import pytest

from beit3_ds.cluster.check.reachability import find_unreachable


def _plant_ssh(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (program := folder / "ssh").write_text(f"#!/bin/sh\nfor host; do :; done\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_only_hosts_that_fail_are_named_with_the_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _plant_ssh(tmp_path, 'case "$*" in *bad*) echo Warning >&2; echo refused >&2; exit 255;; esac', monkeypatch)
    assert asyncio.run(find_unreachable(["good", "bad", "localhost"])) == {"bad": "refused"}


def test_a_host_that_says_nothing_is_named_with_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _plant_ssh(tmp_path, "exit 7", monkeypatch)
    assert asyncio.run(find_unreachable(["a"])) == {"a": "ssh ended with status 7"}


def test_a_machine_without_ssh_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert asyncio.run(find_unreachable(["a"])) == {"a": "there is no ssh here"}
