"""Provides launches that the tests of a file start."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.launch.running_launch import Launch


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    """Provides a function that starts a launch; kills processes that the launch leaves behind."""
    started = []

    def start(faults: list[Any], hosts: str = "localhost slots=3\n", **options: Any) -> Launch:
        started.append(Launch(tmp_path, hosts, faults, **options))
        return started[-1]

    yield start
    for one in started:
        one.end()
