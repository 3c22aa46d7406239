"""Builds runs of the retrieval task on drawn scenes."""

import json
from pathlib import Path
from typing import Any

from beit3_ds.sample_data.write_scenes import write_scenes
from tests.fixtures.tokenizers import copy_tokenizers
from tests.run_config import small_run_mapping

NUM_TRAIN, NUM_VALIDATION = 20, 13
"""Numbers of images.

13 is not divisible by any tested number of ranks, and 65 captions are no multiple of a batch.
"""


def write_files(folder: Path) -> Path:
    """Writes scenes with five captions each, and the tokenizers; returns the folder."""
    write_scenes(folder, NUM_TRAIN, NUM_VALIDATION, size=32)
    copy_tokenizers(folder)
    return folder


def write_config(
    files: Path,
    folder: Path,
    zero_stage: int = 0,
    parallel: dict[str, Any] | None = None,
    accumulation: int = 2,
    **changes: Any,
) -> Path:
    """Writes the configuration of a run of four steps below `folder`; `changes` are updates of sections."""
    mapping = small_run_mapping(
        zero_stage, (0, 8, 0), accumulation, image_size=32, drop_path_rate=0.2, inputs=["images", "texts"]
    )
    own = mapping["beit3_ds"]
    own["task"] = {"name": "retrieval", "shown_queries": 3}
    own["parallel"] = {**(parallel or {}), "timeout_seconds": 300}
    source = {"path": str(files / "captions.json"), "images": str(files), "format": "karpathy"}
    pairs = {"train": [{**source, "split": "train"}], "validation": [{**source, "split": "val"}], "samples_per_step": 8}
    own["data"] = {
        "pairs": pairs,
        "pair_text_length": 32,
        "text_length": 32,
        "num_workers": 0,
        "rand_augment_operations": 2,
    }
    own["tokenizers"] = {"text": {"path": str(files / "text.spm"), "vocab_size": 1000}}
    own["training"] = {
        "output_dir": str(folder / "run"),
        "total_steps": 4,
        "warmup_steps": 1,
        "learning_rate": 1e-3,
        "log_interval": 1,
        "eval_interval": 2,
        "eval_batch_size": 3,
        "save_interval": 1,
        "keep_checkpoints": 4,
    }
    for section, values in changes.items():
        own[section] |= values
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / "config.json"
    path.write_text(json.dumps(mapping))
    return path
