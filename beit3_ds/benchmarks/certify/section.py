"""Runs one section of `beit3 certify` in this process: `python -m ... NAME MODULE --out FILE --call N`."""

import argparse
import importlib
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from beit3_ds.benchmarks.certify.recorder import NeedsDeviceError, Recorder, is_own, top_level
from beit3_ds.benchmarks.certify.results import ABSENT, NEEDS_DEVICE, ResultsFile


def run_section(name: str, module: str, path: Path, call: int, architecture: int | None = None) -> None:
    """Runs all measurements of a section. Also records warnings, and how many kernels Triton compiled.

    If a package or a GPU that the section needs is missing, the recorded status says so.

    Args:
        name: name of the section.
        module: module of the section, with a function `measure(recorder)`.
        path: path of the results file.
        call: number of this call of `beit3 certify`.
        architecture: compute capability of the GPU that a dry run emulates; None measures this machine.
    """
    recorder = Recorder(name, path, call, is_dry_run=architecture is not None)
    _record_warnings(recorder)
    try:
        found = importlib.import_module(module)
        with _emulated(architecture):
            recorder.start_counting()
            found.measure(recorder)
    except ModuleNotFoundError as error:
        if is_own(error):
            raise
        ResultsFile(path).append({"section": name, "status": ABSENT + top_level(error), "call": call})
    except NeedsDeviceError:
        ResultsFile(path).append({"section": name, "status": NEEDS_DEVICE, "call": call})
    recorder.add_counts()


def _emulated(architecture: int | None) -> AbstractContextManager[None]:
    if architecture is None:
        return nullcontext()
    from beit3_ds.benchmarks.certify.dry_run import dry_run  # imports torch, which a section without tensors need not

    return dry_run(architecture)


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
    """Parses the command-line arguments and runs the section."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("module")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--call", type=int, required=True)
    parser.add_argument("--dry-run", type=int)
    options = parser.parse_args()
    run_section(options.name, options.module, options.out, options.call, options.dry_run)


if __name__ == "__main__":
    main()
