"""Checks DeepSpeed's part of a run's file and builds the engine's configuration from it."""

import os
from collections.abc import Mapping
from typing import Any

from beit3_ds.config.deepspeed_keys import DEEPSPEED_KEYS
from beit3_ds.config.deepspeed_options import DeepSpeedOptions
from beit3_ds.config.key_specs import read_key
from beit3_ds.config.strict import check_known_keys

OWN_SECTION = "beit3_ds"
"""The key of this project's section in a DeepSpeed JSON file."""

FILE_MONITORS = {"csv_monitor": "csv", "tensorboard": "tensorboard"}
"""Monitors of DeepSpeed that write files, each with its default folder."""

_MONITORS_FOLDER = "logs"


def read_deepspeed_keys(mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checks all keys except this project's own section; returns them in the form that the engine takes.

    Raises:
        ConfigError: for a key that DeepSpeed does not know or this project does not support, or a wrong value.
    """
    check_known_keys(mapping, [*DEEPSPEED_KEYS, OWN_SECTION], where)
    return {key: read_key(DEEPSPEED_KEYS[key], value, key) for key, value in mapping.items() if key != OWN_SECTION}


def engine_config(
    mapping: Mapping[str, Any], samples_per_step: int, data_parallel_size: int, output_dir: str
) -> dict[str, Any]:
    """Builds the dictionary for `deepspeed.initialize` from the user's keys and the run.

    This project's schedule owns the micro-batches, so the engine's accumulation is always 1. DeepSpeed asserts that its
    batch sizes are products of each other, which does not hold for uneven shares. So the engine gets only the largest
    share, and uses it only for figures in its own log. Monitors write below the run's folder.
    """
    config = {
        **{key: value for key, value in mapping.items() if key != "train_batch_size"},
        "train_micro_batch_size_per_gpu": -(-samples_per_step // data_parallel_size),
        "gradient_accumulation_steps": 1,
    }
    if DeepSpeedOptions(mapping).offloads_optimizer:
        config["zero_force_ds_cpu_optimizer"] = False  # otherwise DeepSpeed refuses torch's AdamW on the host
    for monitor, folder in FILE_MONITORS.items():
        if monitor in mapping:
            config[monitor] = {
                "job_name": folder,
                **mapping[monitor],
                "output_path": _below(output_dir, mapping[monitor]),
            }
    return config


def _below(output_dir: str, monitor: Mapping[str, Any]) -> str:
    return os.path.join(output_dir, monitor.get("output_path", _MONITORS_FOLDER))
