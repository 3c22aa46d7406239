"""Builds small run configurations for the tests."""

import copy
import json
from pathlib import Path
from typing import Any

from beit3_ds.config import RunConfig, build_run_config

CONFIGS = Path(__file__).parents[1] / "ds_configs"
QUICKSTART = CONFIGS / "quickstart_cpu.json"


def quickstart_mapping() -> dict[str, Any]:
    """Returns the shipped quickstart configuration as a JSON object that the caller may change."""
    return json.loads(QUICKSTART.read_text())


def visual_tokenizer_mapping(folder: Path, steps: int = 6, **visual: Any) -> dict[str, Any]:
    """Returns a run of a tiny visual tokenizer on the sample data that writes below `folder`.

    Args:
        folder: folder for the output.
        steps: number of steps.
        **visual: changed settings of the tokenizer.
    """
    mapping: dict[str, Any] = json.loads((CONFIGS / "quickstart_visual_tokenizer_cpu.json").read_text())
    own = mapping["beit3_ds"]
    sizes = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "codebook_size": 16}
    own["tokenizers"]["visual"] |= {**sizes, "path": str(folder / "visual.safetensors"), **visual}
    own["task"]["continuous_steps"] = 2
    own["data"]["images"]["samples_per_step"] = 8
    own["training"] |= {"output_dir": str(folder / "run"), "total_steps": steps, "warmup_steps": 2}
    own["training"] |= {"log_interval": 1, "eval_interval": 3, "eval_samples": 10, "save_interval": 2}
    own["training"] |= {"learning_rate": 1e-3, "keep_checkpoints": 9}
    return mapping


def small_run_mapping(
    zero_stage: int, samples: tuple[int, int, int] = (4, 4, 4), accumulation: int = 1, **model: Any
) -> dict[str, Any]:
    """Returns a run of a tiny model without monitors; `samples` are images, pairs and texts per step."""
    mapping = quickstart_mapping()
    for key in ("csv_monitor", "tensorboard"):
        del mapping[key]
    mapping["zero_optimization"] = {"stage": zero_stage}
    if zero_stage == 3:
        mapping["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    mapping["gradient_accumulation_steps"] = accumulation
    own = mapping["beit3_ds"]
    sizes = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 2}
    own["model"] |= {**sizes, "sub_layernorm": False, **model}
    own["training"]["eval_samples"] = 8  # the quickstart evaluates 256 samples of each stream
    for stream, count in zip(("images", "pairs", "texts"), samples, strict=True):
        own["data"][stream]["samples_per_step"] = count
    return mapping


def small_run_config(zero_stage: int, **changes: Any) -> RunConfig:
    """Builds the configuration of `small_run_mapping`."""
    return build_run_config(copy.deepcopy(small_run_mapping(zero_stage, **changes)))
