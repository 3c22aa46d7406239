"""Saving and resuming a run, and getting weights out and in."""

from beit3_ds.checkpoint.engine_state import EngineState
from beit3_ds.checkpoint.folder import CheckpointFolder
from beit3_ds.checkpoint.run_description import RunDescription, describe_run
from beit3_ds.checkpoint.store import CheckpointStore, SaveOutcome

__all__ = ["CheckpointFolder", "CheckpointStore", "EngineState", "RunDescription", "SaveOutcome", "describe_run"]
