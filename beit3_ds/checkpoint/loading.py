"""Finds the newest undamaged checkpoint, which all ranks check together, and loads it under any layout of ranks."""

from pathlib import Path

from beit3_ds.checkpoint.collection import CheckpointCollection
from beit3_ds.checkpoint.engine_state import EngineState
from beit3_ds.checkpoint.folder import CheckpointFolder, checkpoint_name
from beit3_ds.checkpoint.index import BrokenIndexError
from beit3_ds.checkpoint.run_description import RunDescription
from beit3_ds.checkpoint.tensor_file import BrokenTensorFileError
from beit3_ds.config import ConfigError
from beit3_ds.parallel import HostGroup, Mesh
from beit3_ds.printing import printable

_LONG_CHECK_BYTES = 1 << 30
_WAYS_OUT = (
    "Nothing was changed. Repair a checkpoint, and the same command resumes from it; to begin anew at step 0, "
    "rename that folder or set another training.output_dir."
)


def agree_on_newest(collection: CheckpointCollection, mesh: Mesh, host: HostGroup) -> CheckpointFolder | None:
    """Returns the newest undamaged checkpoint, on which all ranks agree; all ranks call this function.

    Each rank verifies the digests of a share of the files. The main rank prints the names of damaged checkpoints. The
    ranks exchange file names and faults through `host`.

    Args:
        collection: checkpoints of the run.
        mesh: the mesh of ranks.
        host: group of all ranks for values in host memory.

    Returns:
        The checkpoint; None if the run has no checkpoints.

    Raises:
        ConfigError: on all ranks, if the folder of checkpoints cannot be read, or checkpoints exist but all are
            unusable.
    """
    names, error = host.broadcast(_list_names(collection) if mesh.is_main else None)
    if error:
        raise ConfigError(f"{error}. {_WAYS_OUT}")
    faults: list[str] = []
    for name in names:
        path = collection.root / name
        folder, own_fault = _examine(path, mesh, host.rank)
        rank, fault = next(((rank, found) for rank, found in enumerate(host.gather(own_fault)) if found), (0, None))
        if fault is None:
            return folder
        collection.mark_damaged(path)
        faults.append(f"{name}: {fault}" + (f" (on {mesh.describe(rank)})" if rank else ""))
        if mesh.is_main:
            rest = "; trying the one before" if len(faults) < len(names) else ""
            print(printable(f"checkpoint {path} is not whole ({fault}){rest}"), flush=True)
    if faults:
        reasons = "; ".join(faults)
        raise ConfigError(f"none of the checkpoints in {collection.root} can be used: {reasons}. {_WAYS_OUT}")
    return None


def _list_names(collection: CheckpointCollection) -> tuple[list[str], str | None]:
    """Returns the names of all checkpoints, newest first. The second result is None.

    If the checkpoints cannot be read, the list is empty, and the second result is an error message.
    """
    try:
        return [path.name for path in collection.paths()], None
    except OSError as error:
        return [], f"the checkpoints in {collection.root} cannot be read: {error.strerror}"


def load_checkpoint(state: EngineState, folder: CheckpointFolder, run: RunDescription, mesh: Mesh) -> int:
    """Loads the training state from a checkpoint of any layout, and closes the checkpoint; all ranks call this
    function.

    Args:
        state: this rank's training state, which is overwritten.
        folder: the checkpoint, which is closed afterwards.
        run: description of this run.
        mesh: the mesh of ranks.

    Returns:
        Number of steps before the checkpoint was saved, including skipped steps. This is also the index of the next
        step.

    Raises:
        ConfigError: if the checkpoint has another task, another model or other tokenizers, or a file contradicts the
            index.
    """
    changes = run.check_resumes(folder.index.run, str(folder.path))
    if changes and mesh.is_main:
        print("settings that differ from the checkpoint's:\n  " + "\n  ".join(changes), flush=True)
    for name, tensor in state.local_tensors.items():
        found = folder.index.shapes.get(name)
        if found != tensor.shape:
            raise ConfigError(f"checkpoint {folder.path}: {name} has shape {found}, the model's is {tensor.shape}.")
    for name, buffer in state.buffers.items():
        stored = folder.index.buffers.get(name)
        wanted = (str(buffer.dtype).removeprefix("torch."), tuple(buffer.shape))
        if stored is None or (stored.dtype, stored.shape) != wanted:
            raise ConfigError(f"checkpoint {folder.path}: the buffer {name} is {stored}, the model's is {wanted}.")
    try:
        state.load(folder.read_kind, folder.index.optimizer_step)
        state.load_buffers(folder.read_buffer)
    except (BrokenIndexError, BrokenTensorFileError) as error:
        raise ConfigError(
            f"checkpoint {folder.path} cannot be loaded, though its digests fit: {error}. Delete it; the same command "
            "then resumes from the one before."
        ) from None
    finally:
        folder.close()
    return folder.step


def _examine(path: Path, mesh: Mesh, rank: int) -> tuple[CheckpointFolder | None, str | None]:
    """Opens a checkpoint and checks this rank's share of the files.

    Returns:
        Pair (checkpoint, fault). The checkpoint is None if `CheckpointFolder` rejects the folder, or if the folder has
        a wrong name. The fault is a description of the first fault, or None if there is no fault.
    """
    try:
        folder = CheckpointFolder(path)
    except BrokenIndexError as error:
        return None, str(error)
    num_bytes = sum(written.num_bytes for written in folder.index.files.values())
    if mesh.is_main and num_bytes > _LONG_CHECK_BYTES:
        print(f"checking {path} ({num_bytes / 1e9:.1f} GB)", flush=True)
    if path.name != checkpoint_name(folder.step):
        return None, f"it holds step {folder.step}"
    return folder, folder.find_damage(folder.files()[rank :: mesh.num_ranks])
