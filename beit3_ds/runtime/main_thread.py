"""Describes where the main thread is, for messages about a process that hangs."""

import sys
import threading
import traceback
from pathlib import Path

_PACKAGE = str(Path(__file__).parents[1])


def describe_main_thread(otherwise: str) -> str:
    """Returns the line of this program at which the main thread is, and the file or folder that it uses.

    Args:
        otherwise: what the main thread does if it uses no file or folder.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    lines, paths = [], []
    for inner, line in traceback.walk_stack(frame):
        if inner.f_code.co_filename.startswith(_PACKAGE):
            lines.append(f"{Path(inner.f_code.co_filename).name}:{line} ({inner.f_code.co_name})")
            values = [inner.f_locals.get(name) for name in ("path", "file", "name", "self")]
            values += [getattr(values[-1], name, None) for name in ("path", "_path")]
            paths += [str(value) for value in values if isinstance(value, str | Path)]
    named = f"with {paths[0]}" if paths else otherwise
    return f"{named}, at {lines[0]}" if lines else named
