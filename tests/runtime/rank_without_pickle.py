"""Runs a rank of the trainer in which unpickling raises an error.

Only data from the rank's own data-loader workers may be unpickled.
"""

import pickle
import sys
from collections.abc import Callable
from typing import Any

from tests.checkpoint.training_run import train

_LOCAL = ("beit3_ds.data.workers.", "multiprocessing.")
"""Modules that communicate only with processes started by this one, through pipes and unix sockets."""


def forbid_unpickling() -> None:
    """Makes every way to unpickle raise: `load`, `loads` and `Unpickler`, under any name in any module.

    An audit hook of the interpreter also detects unpickling in compiled code, if the pickle names a class or a
    function.
    """
    for name in ("load", "loads", "Unpickler"):
        original = getattr(pickle, name)
        refusing = _refuse(name, original)
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith(_LOCAL):
                continue
            for own, value in list(getattr(module, "__dict__", {}).items()):
                if value is original:
                    setattr(module, own, refusing)
    sys.addaudithook(_audit)


def _refuse(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(*arguments: Any, **options: Any) -> Any:
        if _is_local():
            return original(*arguments, **options)
        raise AssertionError(f"pickle.{name} was called between ranks")

    return refuse


def _audit(event: str, _: tuple[Any, ...]) -> None:
    if event == "pickle.find_class" and not _is_local():
        raise AssertionError("a pickle was read between ranks")


def _is_local() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(_LOCAL):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


if __name__ == "__main__":
    forbid_unpickling()
    train(sys.argv[1], sys.argv[2:])
