"""Runs one section of a certification in a process of its own: `python -m ... NAME MODULE --out FILE --call N`."""

import argparse
import importlib
import warnings
from pathlib import Path
from typing import Any

from beit3_ds.benchmarks.certify.compilations import Compilations
from beit3_ds.benchmarks.certify.recorder import NeedsDeviceError, Recorder, is_own, top_level
from beit3_ds.benchmarks.certify.results import ABSENT, NEEDS_DEVICE, ResultsFile


def run_section(name: str, module: str, path: Path, call: int) -> None:
    """Measures all items of a section, and records warnings and compilations of Triton kernels too.

    The module has a function `measure(recorder)`. If a package that it needs is absent, or if it needs a device and
    there is none, this becomes the status of the section.
    """
    recorder = Recorder(name, path, call)
    _record_warnings(recorder)
    compilations = Compilations()
    try:
        found = importlib.import_module(module)
        compilations.start()
        found.measure(recorder)
    except ModuleNotFoundError as error:
        if is_own(error):
            raise
        ResultsFile(path).append({"section": name, "status": ABSENT + top_level(error), "call": call})
    except NeedsDeviceError:
        ResultsFile(path).append({"section": name, "status": NEEDS_DEVICE, "call": call})
    if compilations.num_hits or compilations.num_misses:
        recorder.add("Triton cache", **compilations.describe())


def _record_warnings(recorder: Recorder) -> None:
    show, seen = warnings.showwarning, set[str]()

    def record(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        show(message, category, *rest)
        text = str(message)[:500]
        if text not in seen and issubclass(category, UserWarning):
            seen.add(text)
            recorder.add(f"warning: {text[:60]}", warning=text)

    warnings.showwarning = record  # type: ignore[assignment]


def main() -> None:
    """Parses the arguments and runs the section."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("module")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--call", type=int, required=True)
    options = parser.parse_args()
    run_section(options.name, options.module, options.out, options.call)


if __name__ == "__main__":
    main()
