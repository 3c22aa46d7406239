"""Checks DeepSpeed's keys in a run's file, and builds the configuration of DeepSpeed's engine from them."""

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
"""DeepSpeed's monitors that write files, with the default folder of each."""

_MONITORS_FOLDER = "logs"


def read_deepspeed_keys(mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checks all keys except this project's own section, and returns them in the form that DeepSpeed expects.

    Raises:
        ConfigError: if DeepSpeed does not know a key, this project does not support it, or its value is invalid.
    """
    check_known_keys(mapping, [*DEEPSPEED_KEYS, OWN_SECTION], where)
    return {key: read_key(DEEPSPEED_KEYS[key], value, key) for key, value in mapping.items() if key != OWN_SECTION}


def engine_config(
    mapping: Mapping[str, Any], samples_per_step: int, data_parallel_size: int, output_dir: str
) -> dict[str, Any]:
    """Builds the configuration for `deepspeed.initialize` from the user's keys and the run's settings.

    This project's schedule runs the micro-batches, so the engine's `gradient_accumulation_steps` is always 1. Its batch
    size is the largest share of a rank, and appears only in its log. Monitors write into the run's output folder.
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
