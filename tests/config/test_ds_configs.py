"""Tests that every shipped configuration loads and passes a dry run.

Also checks that the giant configuration has the paper's settings.
"""

import json
import re
from pathlib import Path

import pytest

from beit3_ds.config import build_run_config, check_layout, load_run_config
from beit3_ds.tasks.pretraining.config import pretraining_config
from beit3_ds.training.dry_run import describe_dry_run

FOLDER = Path(__file__).parents[2] / "ds_configs"
WORLD_SIZES = {
    "quickstart_cpu": 2,
    "quickstart_visual_tokenizer_cpu": 1,
    "visual_tokenizer_8gpu": 8,
    "demo_tp2_pp2_dp2_zero3": 8,
    "giant_tp2_pp4_zero3_cpu_twin": 8,
    "base_8gpu": 8,
    "giant_zero3_64gpu": 64,
    "giant_tp2_pp4_zero3": 64,
    "beit3_4b_tp2_pp2_zero1": 32,
    "beit3_10b_tp4_pp4_zero1": 128,
    "imagenet_base": 8,
    "imagenet_large": 8,
    "imagenet_giant": 32,
    "imagenet21k_giant": 64,
    "imagenet_small_cpu": 2,
    "captioning_base": 8,
    "captioning_large": 8,
    "captioning_giant": 32,
    "captioning_small_cpu": 2,
    "vqa_base": 8,
    "vqa_large": 8,
    "vqa_giant": 32,
    "vqa_small_cpu": 2,
    "retrieval_base": 8,
    "retrieval_large": 16,
    "retrieval_giant": 32,
    "retrieval_intermediate_base": 16,
    "retrieval_intermediate_large": 32,
    "retrieval_intermediate_giant": 64,
    "retrieval_small_cpu": 2,
    "nlvr2_base": 8,
    "nlvr2_large": 8,
    "nlvr2_giant": 32,
    "nlvr2_small_cpu": 2,
    "segmentation_base": 8,
    "segmentation_large": 16,
    "segmentation_giant": 64,
    "segmentation_small_cpu": 2,
    "detection_base": 8,
    "detection_large": 16,
    "detection_giant": 64,
    "detection_intermediate_base": 16,
    "detection_intermediate_large": 32,
    "detection_intermediate_giant": 64,
    "detection_small_cpu": 2,
}


def test_every_file_is_listed() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(WORLD_SIZES)


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_dry_run(name: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = load_run_config(FOLDER / f"{name}.json")
    text = describe_dry_run(config, WORLD_SIZES[name])
    assert "parameters" in text
    if config.backbone is None:
        assert "visual tokenizer, " in text and "memory, total without activations, GiB" in text
        return
    stages = config.parallel.pipeline_parallel_size
    (header,) = (line for line in text.splitlines() if line.startswith("modelled"))
    assert re.findall(r"stage \d+", header) == [f"stage {stage}" for stage in range(stages)]
    assert all(
        line in text for line in ("modelled", "memory, total, GiB", "sent per step, total, GB", "pipeline bubble")
    )
    engine = config.engine_config(check_layout(config, WORLD_SIZES[name]))
    assert engine["gradient_accumulation_steps"] == 1
    parsed = DeepSpeedConfig({**engine, "train_batch_size": engine["train_micro_batch_size_per_gpu"]})
    assert parsed.zero_config.stage == config.deepspeed["zero_optimization"]["stage"]


def test_giant_holds_the_papers_settings() -> None:
    config = load_run_config(FOLDER / "giant_zero3_64gpu.json")
    streams = [stream.samples_per_step for stream in config.data.streams().values()]
    assert streams == [2048, 2048, 2048]
    training, model, data = config.training, config.model, config.data
    ratios = pretraining_config(config)
    assert (training.total_steps, training.warmup_steps, training.learning_rate) == (1_000_000, 10_000, 1e-3)
    assert (training.adam_betas, training.adam_epsilon, training.weight_decay) == ((0.9, 0.98), 1e-6, 0.05)
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size) == (40, 1408, 6144)
    assert (model.patch_size, model.image_size, model.drop_path_rate) == (14, 224, 0.1)
    assert (model.layout, model.sub_layernorm, model.num_vision_language_layers) == ("shared", False, 3)
    assert (model.text_vocab_size, model.visual_vocab_size) == (64010, 8192)
    assert (ratios.image_mask_ratio, ratios.text_mask_ratio, ratios.pair_text_mask_ratio) == (0.4, 0.15, 0.5)
    assert (data.text_length, data.pair_text_length) == (128, 64)
    assert config.tokenizers.visual.image_size == 256  # the patch-16 tokenizer gives patch 14 its 16 x 16 grid
    assert config.deepspeed["gradient_clipping"] == 3.0
    assert config.deepspeed["bf16"]["enabled"]
    assert config.deepspeed["zero_optimization"]["stage"] == 3


def giant_stages(stage: int, **parallel: int) -> dict[str, list[str]]:
    """Returns the dry run's table of the giant model on 64 ranks, by row name.

    Args:
        stage: ZeRO stage.
        **parallel: keys of the section "parallel".
    """
    mapping = json.loads((FOLDER / "giant_zero3_64gpu.json").read_text())
    mapping["zero_optimization"]["stage"] = stage
    mapping["gradient_accumulation_steps"] = 16 if "pipeline_parallel_size" in parallel else 1
    mapping["beit3_ds"]["parallel"] = parallel
    table = describe_dry_run(build_run_config(mapping), 64).split("\n\n")[1]
    cells = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    return {name: values for name, *values in cells}


def test_giant_costs_equal_estimates_by_hand() -> None:
    """Compares the planner's figures for 64 ranks with estimates made by hand.

    Training states take 18 bytes per parameter, divided over 64 ranks: 2 of weights, 4 of gradients and 12 of the
    optimizer. Tensor-parallel ranks send 4 T D e bytes per layer. Pipeline stages send a float32 stream.
    """
    states = ("memory, parameters, GiB", "memory, gradients, GiB", "memory, optimizer, GiB")
    zero3 = giant_stages(3)
    numel = 1_947.7e6
    assert sum(float(zero3[row][0]) for row in states) == pytest.approx(numel * 18 / 64 / 2**30, abs=0.02)
    rows = 2 * 32 * (257 + 257 + 64 + 128)  # of two data-parallel ranks' samples, which a pair of tensor ranks shares
    tensor = float(giant_stages(1, tensor_parallel_size=2)["sent per step, tensor, GB"][0])
    assert tensor == pytest.approx(40 * 4 * rows * 1408 * 2 / 1e9, rel=0.02)
    messages = giant_stages(3, tensor_parallel_size=2, pipeline_parallel_size=4)["sent per step, pipeline, GB"]
    stream = 8 * 32 * (257 + 257 + 64 + 128) * 1408 * 4 / 1e9
    assert [float(value) for value in messages] == pytest.approx([stream, 2 * stream, 2 * stream, stream], abs=0.01)
