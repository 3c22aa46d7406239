"""Measures the main rank's work on a checkpoint's index, which lists the files of many ranks.

The measurement runs in one process. The ranks are synthetic, and their weight and moment files are empty.
"""

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from beit3_ds.benchmarks.checkpoint.ranks import state_config
from beit3_ds.checkpoint.collection import CheckpointCollection
from beit3_ds.checkpoint.folder import CheckpointFolder
from beit3_ds.checkpoint.index import Index, file_name
from beit3_ds.checkpoint.pieces import Piece, PieceTable, check_cover
from beit3_ds.checkpoint.rank_report import RankReport
from beit3_ds.checkpoint.run_description import RunDescription
from beit3_ds.checkpoint.slices import slice_range, whole_slice
from beit3_ds.checkpoint.tensor_file import WrittenFile
from beit3_ds.tasks.pretraining.model import PretrainingModel

_KEPT, _ROUNDS = 3, 5
_RUN = RunDescription(model={}, config={}, tokenizers={}, layout="synthetic", versions={})
_EMPTY = WrittenFile(0, "0" * 64)


class _Clock:
    """Measures the CPU seconds of `with` blocks. Each block has a name."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name].append(time.process_time() - start)


def benchmark_index(ranks: int = 512, size: str = "giant", json_path: str | None = None) -> str:
    """Measures the main rank's work on the index when a ZeRO-3 checkpoint is saved and loaded; returns a report.

    Times are median CPU seconds. The first saves do not count, because they do not yet delete an old checkpoint.

    Args:
        ranks: number of synthetic ranks, all data-parallel.
        size: model size.
        json_path: file for the results as JSON.
    """
    plain, clock = [report.to_plain() for report in _build_reports(size, ranks)], _Clock()
    with tempfile.TemporaryDirectory() as scratch:
        collection = CheckpointCollection(Path(scratch), _KEPT)
        for step in range(1, _KEPT + _ROUNDS + 1):
            with clock.measure("read the ranks' reports"):
                reports = [RankReport.from_plain(*values) for values in plain]
            with clock.measure("join them"):
                index, pieces = _join(reports, step)
            temporary = collection.create_temporary(step)
            for name in index.files:
                (temporary / name).touch()
            with clock.measure("check that pieces cover all tensors"):
                check_cover(index.shapes, pieces)
            with clock.measure("check, write, publish and prune"):
                collection.publish(index, pieces)
            with clock.measure("find the newest whole checkpoint"):
                newest = collection.newest_path()
            assert newest == collection.path(step)
            with clock.measure("open and check it"):
                folder = CheckpointFolder(newest)
        num_bytes = sum(path.stat().st_size for path in collection.path(step).iterdir())
    seconds = {name: statistics.median(values[_KEPT:]) for name, values in clock.seconds.items()}
    if json_path:
        summary = {"ranks": ranks, "size": size, "pieces": len(folder.pieces.rows), "bytes": num_bytes}
        Path(json_path).write_text(json.dumps({"summary": summary | {"seconds": seconds}}, indent=2))
    return "\n".join(
        [
            f"{size}, {ranks} ranks: {len(folder.pieces.rows):,} pieces, {num_bytes / 1e6:.1f} MB",
            "| work | CPU s |",
            "|---|---|",
            *(f"| {name} | {value:.2f} |" for name, value in seconds.items()),
        ]
    )


def _build_reports(size: str, ranks: int) -> list[RankReport]:
    """Returns the reports that ranks would send to the main rank if ZeRO-3 divided every tensor among them."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in PretrainingModel(state_config(size, 1).model).named_parameters()}
    reports = []
    for rank in range(ranks):
        files = {file_name(kind, rank): _EMPTY for kind in ("weights", "moments")}
        pieces = PieceTable.build(
            (name, Piece(rank, part))
            for name, shape in shapes.items()
            for share in [-(-shape.numel() // ranks)]
            for _, part in slice_range(whole_slice(shape), share * rank, share * (rank + 1))
        )
        held = {name: shapes[name] for name in pieces.counts}
        reports.append(RankReport(None, files, held, pieces, {}))
    return reports


def _join(reports: Sequence[RankReport], step: int) -> tuple[Index, PieceTable]:
    pieces = PieceTable.join([report.pieces for report in reports])
    index = Index(
        step=step,
        optimizer_step=step,
        run=_RUN,
        shapes={name: shape for report in reports for name, shape in report.shapes.items()},
        num_pieces=pieces.counts,
        files={name: file for report in reports for name, file in report.files.items()},
    )
    return index, pieces
