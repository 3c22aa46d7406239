"""Runs a module of the command line; prints where the main thread was when a signal arrived."""

import runpy
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import beit3_ds
from beit3_ds.runtime import stop_signals

MARK = "a signal arrived in: "
_PACKAGE = str(Path(beit3_ds.__file__).parent)


def _print_place() -> None:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    names = [
        f"{Path(inner.f_code.co_filename).stem}.{inner.f_code.co_name}"
        for inner, _ in traceback.walk_stack(frame)
        if inner.f_code.co_filename.startswith(_PACKAGE)
    ]
    print(MARK + " ".join(reversed(names)), file=sys.stderr, flush=True)


def _watch_signals() -> None:
    read = stop_signals._read

    def read_and_print(pipe: int, note: Callable[[int], None]) -> None:
        def note_and_print(number: int) -> None:
            _print_place()
            note(number)

        read(pipe, note_and_print)

    stop_signals._read = read_and_print


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    _watch_signals()
    module, *sys.argv[1:] = sys.argv[1:]
    sys.modules.pop(module, None)  # it runs again, as `__main__`
    runpy.run_module(module, run_name="__main__", alter_sys=True)
