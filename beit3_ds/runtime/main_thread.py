"""Describes what the main thread is doing, for messages about a process that hangs."""

import sys
import threading
import traceback
from pathlib import Path

_PACKAGE = str(Path(__file__).parents[1])


def describe_main_thread(otherwise: str) -> str:
    """Describes what the main thread is doing.

    The text names the file or folder that the thread uses. If none is known, the text names what the thread waits for.
    At the end, the text names the line of this package that the thread executes.

    Args:
        otherwise: first part of the text if no file, folder or wait is known; may be empty.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    lines, paths, awaited = [], [], []
    for inner, line in traceback.walk_stack(frame):
        if inner.f_code.co_filename.startswith(_PACKAGE):
            lines.append(f"{Path(inner.f_code.co_filename).name}:{line} ({inner.f_code.co_name})")
            owner = inner.f_locals.get("self")
            awaited.append(getattr(owner, "_waits_for", None))  # an attribute of `Rendezvous`: what it waits for
            values = [inner.f_locals.get(name) for name in ("path", "file", "name")]
            values += [getattr(owner, name, None) for name in ("path", "_path")]
            paths += [str(value) for value in values if isinstance(value, str | Path) and "/" in str(value)]
    named = next((f"waiting for {what}" for what in awaited if isinstance(what, str)), otherwise)
    named = f"with {paths[0]}" if paths else named
    return ", ".join(filter(None, [named, *(f"at {line}" for line in lines[:1])]))
