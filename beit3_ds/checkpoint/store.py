"""Checkpoints that are whole or absent: written aside, listed in a manifest, then renamed."""

import json
import os
import shutil
from pathlib import Path

from deepspeed import DeepSpeedEngine

from beit3_ds.config import ConfigError
from beit3_ds.parallel import Mesh

_MANIFEST = "manifest.json"
_TAG = "engine"


class CheckpointStore:
    """The folder `OUTPUT_DIR/checkpoints` with one subfolder `step-XXXXXXXX` a checkpoint.

    The state inside is DeepSpeed's own: it resumes on the same number of ranks and the same ZeRO stage. Nothing random
    is saved, because batches, masks and stochastic depth follow from the seed and the step.
    """

    def __init__(self, root: Path, keep: int, mesh: Mesh) -> None:
        """Opens the folder; it is made at the first save."""
        self.root, self.keep, self.mesh = root, keep, mesh
        self._stage = f"stage-{mesh.pipeline.rank}"  # DeepSpeed names files by data and tensor rank alone

    def save(self, engine: DeepSpeedEngine, step: int) -> Path:
        """Saves the state after `step` updates and deletes all but the newest whole ones. All ranks call it.

        Returns:
            The checkpoint's folder.
        """
        target = self.root / f"step-{step:08d}"
        aside = self.root / f".writing-{target.name}"
        if self.mesh.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.mesh.barrier()
        engine.save_checkpoint(str(aside / self._stage), tag=_TAG, client_state={"step": step}, save_latest=False)
        self.mesh.barrier()
        if self.mesh.is_main:
            _write_manifest(aside, step, _layout(self.mesh))
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
            _sync_folder(self.root)
            self._prune()
        self.mesh.barrier()
        return target

    def newest(self) -> Path | None:
        """The newest whole checkpoint, or None; torn ones are passed over and named on the main rank."""
        for folder in sorted(self.root.glob("step-*"), reverse=True):
            fault = _find_fault(folder)
            if fault is None:
                return folder
            if self.mesh.is_main:
                print(f"checkpoint {folder} is not whole ({fault}); trying the one before", flush=True)
        return None

    def load(self, engine: DeepSpeedEngine, folder: Path) -> int:
        """Restores parameters and optimizer state. All ranks call it.

        Returns:
            The number of updates that the checkpoint holds, which is the step to go on with.

        Raises:
            ConfigError: if it was saved by another layout of ranks.
        """
        manifest = json.loads((folder / _MANIFEST).read_text())
        if manifest["layout"] != _layout(self.mesh):
            raise ConfigError(
                f"checkpoint {folder} was saved by {manifest['layout']} and cannot be resumed on {_layout(self.mesh)}. "
                f"Use the same ranks and parallel section, or another training.output_dir."
            )
        engine.load_checkpoint(str(folder / self._stage), tag=_TAG)
        return int(manifest["step"])

    def _prune(self) -> None:
        whole = [folder for folder in sorted(self.root.glob("step-*")) if _find_fault(folder) is None]
        for folder in whole[: -self.keep]:
            shutil.rmtree(folder)


def _layout(mesh: Mesh) -> str:
    axes = f"{mesh.data_parallel_size} data-parallel x {mesh.tensor.size} tensor-parallel ranks"
    return axes if mesh.pipeline.size == 1 else f"{mesh.pipeline.size} stages of {axes}"


def _write_manifest(folder: Path, step: int, layout: str) -> None:
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    for name in files:
        _sync_file(folder / name)
    manifest = {"step": step, "layout": layout, "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1))
    _sync_file(folder / _MANIFEST)
    _sync_folder(folder)


def _find_fault(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
    except (OSError, json.JSONDecodeError):
        return "no readable manifest"
    for name, size in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
