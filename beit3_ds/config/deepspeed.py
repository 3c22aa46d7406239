"""Checks the DeepSpeed keys of a run's file, and builds the configuration for `deepspeed.initialize` from them."""

import os
from collections.abc import Mapping
from typing import Any

from beit3_ds.config.deepspeed_keys import DEEPSPEED_KEYS
from beit3_ds.config.deepspeed_options import DeepSpeedOptions
from beit3_ds.config.key_specs import read_key
from beit3_ds.config.strict import check_known_keys

OWN_SECTION = "beit3_ds"
"""Key of this project's section in the JSON file; all other top-level keys are DeepSpeed's."""

FILE_MONITORS = {"csv_monitor": "csv", "tensorboard": "tensorboard"}
"""Maps each DeepSpeed monitor that writes files to the default name of the monitor's folder."""

_MONITORS_FOLDER = "logs"


def read_deepspeed_keys(mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checks the DeepSpeed keys of a run's file, and returns them in the form that DeepSpeed expects.

    Args:
        mapping: the JSON object at the top of the file; this project's section "beit3_ds" is skipped.
        where: name of the object in error messages.

    Raises:
        ConfigError: if a key is unknown, is not supported by this project, or has an invalid value.
    """
    check_known_keys(mapping, [*DEEPSPEED_KEYS, OWN_SECTION], where)
    return {key: read_key(DEEPSPEED_KEYS[key], value, key) for key, value in mapping.items() if key != OWN_SECTION}


def engine_config(
    mapping: Mapping[str, Any], samples_per_step: int, data_parallel_size: int, output_dir: str
) -> dict[str, Any]:
    """Builds the configuration for `deepspeed.initialize`.

    The result differs from the user's keys as follows:

    * `train_batch_size` is left out, because DeepSpeed computes it.
    * `gradient_accumulation_steps` is 1, because this project's schedule runs the micro-batches.
    * `train_micro_batch_size_per_gpu` is the largest number of samples that a rank has per step. Only DeepSpeed's log
      uses this number.
    * If the optimizer is offloaded, `zero_force_ds_cpu_optimizer` is false, because DeepSpeed would otherwise reject
      torch's AdamW.
    * Monitors write below `output_dir`.

    Args:
        mapping: the checked DeepSpeed keys of the run's file.
        samples_per_step: samples per optimizer step, over all ranks.
        data_parallel_size: number of data-parallel ranks.
        output_dir: the run's output folder.
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
