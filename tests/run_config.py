"""Small run configurations for the tests."""

import copy
import json
from pathlib import Path
from typing import Any

from beit3_ds.config import RunConfig, build_run_config

QUICKSTART = Path(__file__).parents[1] / "ds_configs" / "quickstart_cpu.json"


def quickstart_mapping() -> dict[str, Any]:
    """The shipped quickstart configuration as a JSON object, to be changed freely."""
    return json.loads(QUICKSTART.read_text())


def small_run_mapping(
    zero_stage: int, samples: tuple[int, int, int] = (4, 4, 4), accumulation: int = 1, **model: Any
) -> dict[str, Any]:
    """A run of a tiny model without monitors; `samples` are images, pairs and texts a step."""
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
    for stream, count in zip(("images", "pairs", "texts"), samples, strict=True):
        own["data"][stream]["samples_per_step"] = count
    return mapping


def small_run_config(zero_stage: int, **changes: Any) -> RunConfig:
    """`small_run_mapping`, built."""
    return build_run_config(copy.deepcopy(small_run_mapping(zero_stage, **changes)))
