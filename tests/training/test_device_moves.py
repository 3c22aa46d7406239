"""Tests the order in which micro-batches are moved to the device, with streams that record events."""

from types import SimpleNamespace
from typing import Any

import torch

from beit3_ds.training.device_moves import DeviceMoves, build_device_moves

CPU = torch.device("cpu")


class Log(list[str]):
    """Records events in order."""

    def batch(self, name: str) -> Any:
        """Returns a batch that records moves and uses of its tensors."""
        tensor = SimpleNamespace(record_stream=lambda stream: self.append(f"{name} is used on {stream.name}"))
        moved = SimpleNamespace(name=f"moved {name}", tensors=lambda: [tensor])

        def to(device: torch.device) -> Any:
            self.append(f"move {name}")
            return moved

        return SimpleNamespace(name=name, to=to)

    def stream(self, name: str) -> Any:
        """Returns a stream that records when code enters it, leaves it or waits for it."""
        return Stream(name, self)


class Stream:
    def __init__(self, name: str, log: Log) -> None:
        self.name, self._log = name, log

    def __enter__(self) -> None:
        self._log.append(f"enter {self.name}")

    def __exit__(self, *exception: object) -> None:
        self._log.append(f"leave {self.name}")

    def wait_stream(self, other: "Stream") -> None:
        self._log.append(f"{self.name} waits for {other.name}")


def test_the_next_micro_batch_is_moved_while_one_is_computed() -> None:
    """Catches a batch that is used before it has arrived, and memory that is freed while the model uses it."""
    log = Log()
    main, first, second = log.stream("main"), log.batch("1"), log.batch("2")
    moves = DeviceMoves(CPU, log.stream("side"), lambda: main)
    moves.announce([first, second])
    assert log == ["enter side", "move 1", "leave side"]
    log.clear()
    assert moves.take(first).name == "moved 1"
    assert log == ["main waits for side", "1 is used on main", "enter side", "move 2", "leave side"]
    log.clear()
    assert moves.take(second).name == "moved 2"
    assert log == ["main waits for side", "2 is used on main"]


def test_other_batches_are_moved_when_they_are_taken() -> None:
    """Checks that an evaluation can take its own batches between two steps while the announced batch stays ready."""
    log = Log()
    moves = DeviceMoves(CPU, log.stream("side"), lambda: log.stream("main"))
    step, other = log.batch("step"), log.batch("other")
    moves.announce([step])
    assert moves.take(other).name == "moved other"
    assert log[3:] == ["move other"]
    assert moves.take(step).name == "moved step"
    assert log.count("move step") == 1


def test_a_cpu_moves_nothing_ahead() -> None:
    log = Log()
    moves, batch = build_device_moves(CPU), log.batch("1")
    moves.announce([batch])
    assert not log
    assert moves.take(batch).name == "moved 1"
