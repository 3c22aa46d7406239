"""Compares the learning rates and optimizer settings of every shipped recipe with the values in the papers."""

import itertools
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.config import ConfigError, RunConfig, load_run_config
from beit3_ds.model.parameter_groups import parameter_group
from beit3_ds.tasks import build_task
from beit3_ds.training.learning_rate import learning_rate, warmup_then_decay

FOLDER = Path(__file__).parents[2] / "ds_configs"


class Curve(NamedTuple):
    """Holds a schedule: numbers of steps, and learning rates at steps where a mistake would show."""

    total_steps: int
    warmup_steps: int
    first: float
    warmed_up: float
    """Learning rate at the last step of the warmup."""
    middle: float
    """Learning rate halfway between the end of the warmup and the last step."""
    last: float


PAPER = Curve(1_000_000, 10_000, 1e-3 / 10_000, 1e-3, 5e-4, 0.0)
"""BEiT-3, section 2.3: 1M steps, peak 1e-3, 10k steps of linear warmup, cosine.

The paper does not state the final rate.
"""

BEIT_V2 = Curve(250_000, 25_000, 2e-4 / 25_000, 2e-4, (2e-4 + 1e-5) / 2, 1e-5)
"""VQ-KD of BEiT v2: 100 ImageNet epochs at batch 8 x 64 = 512, of which 10 are warmup.

The rate falls from 512 / 128 * 5e-5 to 1e-5.
"""

SAMPLE_TOKENIZER = Curve(600, 40, 3e-3 / 40, 3e-3, (3e-3 + 1e-5) / 2, 1e-5)
"""The small tokenizers of the sample data, with a recipe of this project."""

PRETRAINING = {
    "giant_zero3_64gpu": PAPER,
    "giant_tp2_pp4_zero3": PAPER,
    "beit3_4b_tp2_pp2_zero1": PAPER,
    "beit3_10b_tp4_pp4_zero1": PAPER,
    "base_8gpu": PAPER._replace(total_steps=200_000),
    "quickstart_cpu": Curve(320, 40, 3e-3 / 40, 3e-3, 1.5e-3, 0.0),
    "demo_tp2_pp2_dp2_zero3": Curve(100, 20, 3e-3 / 20, 3e-3, 1.5e-3, 0.0),
    "giant_tp2_pp4_zero3_cpu_twin": Curve(100, 20, 3e-3 / 20, 3e-3, 1.5e-3, 0.0),
}
NLVR2 = Curve(6_760, 1_690, 0, 0, 0, 1e-6)
"""20 epochs of 86,373 statements at batch 256, as in the reference.

This project chose the warmup of 5 epochs and the final rate.
"""

CAPTIONING = Curve(22_140, 2_214, 0, 0, 0, 1e-6)
"""10 epochs of 566,747 captions at batch 256, as in the reference.

This project chose the warmup of 1 epoch and the final rate.
"""

DETECTION = Curve(184_375, 250, 0, 0, 0, 0.0)
"""100 epochs of 118,000 images at batch 64, as in ViTDet for the sizes base and large."""

OBJECTS365 = Curve(380_000, 1_000, 0, 0, 0, 0.0)
"""The intermediate stage of detection; this project chose the number of steps."""

SEGMENTATION = Curve(160_000, 1_500, 0, 0, 0, 0.0)
"""160,000 steps with a warmup of 1,500 and a linear decay; giant takes 40,000 steps, as in EVA-01."""

IMAGENET = Curve(62_557, 6_256, 0, 0, 0, 1e-6)
"""50 epochs of 1,281,167 images at batch 1024, as in the reference.

This project chose the warmup of 5 epochs and the final rate.
"""

VQA = Curve(51_410, 5_141, 0, 0, 0, 1e-6)
"""10 epochs of 658,111 questions at batch 128, as in the reference.

This project chose the warmup of 1 epoch and the final rate.
"""

RETRIEVAL = Curve(2_775, 555, 0, 0, 0, 1e-6)
"""15 epochs of 566,747 captions at batch 3072, of which 3 are warmup, as in the reference.

This project chose the final rate.
"""

CONTRASTIVE = Curve(20_000, 1_000, 0, 0, 0, 1e-6)
"""The intermediate stage of retrieval, with a recipe of this project."""

FINE_TUNING = {
    "vqa_base": (VQA, 3e-5),
    "vqa_large": (VQA, 2e-5),
    "vqa_giant": (VQA, 1e-5),
    "vqa_small_cpu": (Curve(1200, 50, 0, 0, 0, 1e-4), 1e-3),
    "retrieval_base": (RETRIEVAL, 2e-4),
    "retrieval_large": (RETRIEVAL, 5e-5),
    "retrieval_giant": (RETRIEVAL, 1e-5),
    "retrieval_intermediate_base": (CONTRASTIVE, 2e-4),
    "retrieval_intermediate_large": (CONTRASTIVE, 1e-4),
    "retrieval_intermediate_giant": (CONTRASTIVE, 5e-5),
    "retrieval_small_cpu": (Curve(400, 40, 0, 0, 0, 0.0), 7e-4),
    "imagenet_base": (IMAGENET, 7e-4),
    "imagenet_large": (IMAGENET, 2e-4),
    "imagenet_giant": (IMAGENET, 1e-4),
    "imagenet21k_giant": (Curve(103_983, 6_932, 0, 0, 0, 1e-6), 3e-4),
    "imagenet_small_cpu": (Curve(200, 20, 0, 0, 0, 0.0), 1e-3),
    "captioning_base": (CAPTIONING, 4e-5),
    "captioning_large": (CAPTIONING, 8e-6),
    "captioning_giant": (CAPTIONING, 8e-6),
    "captioning_small_cpu": (Curve(700, 50, 0, 0, 0, 0.0), 1.5e-3),
    "detection_base": (DETECTION, 1e-4),
    "detection_large": (DETECTION, 1e-4),
    "detection_giant": (DETECTION._replace(total_steps=45_000), 2.5e-5),
    "detection_intermediate_base": (OBJECTS365, 1e-4),
    "detection_intermediate_large": (OBJECTS365, 1e-4),
    "detection_intermediate_giant": (OBJECTS365, 6e-5),
    "detection_small_cpu": (Curve(400, 40, 0, 0, 0, 0.0), 5e-4),
    "segmentation_base": (SEGMENTATION, 6e-5),
    "segmentation_large": (SEGMENTATION._replace(total_steps=80_000), 2e-5),
    "segmentation_giant": (SEGMENTATION._replace(total_steps=40_000), 1e-5),
    "segmentation_small_cpu": (Curve(200, 20, 0, 0, 0, 0.0), 1e-3),
    "nlvr2_base": (NLVR2, 7e-4),
    "nlvr2_large": (NLVR2, 3e-4),
    "nlvr2_giant": (NLVR2, 1e-4),
    "nlvr2_small_cpu": (Curve(200, 20, 0, 0, 0, 0.0), 1e-3),
}
"""Schedule and peak rate of each fine-tuning recipe."""
TOKENIZERS = {"visual_tokenizer_8gpu": BEIT_V2, "quickstart_visual_tokenizer_cpu": SAMPLE_TOKENIZER}


def load(name: str) -> RunConfig:
    return load_run_config(FOLDER / f"{name}.json")


def test_every_recipe_is_listed() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {*PRETRAINING, *FINE_TUNING, *TOKENIZERS}


@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning_follows_its_recipe(name: str) -> None:
    training, (curve, peak) = load(name).training, FINE_TUNING[name]
    assert (training.total_steps, training.warmup_steps) == (curve.total_steps, curve.warmup_steps)
    assert learning_rate(training, training.warmup_steps - 1) == pytest.approx(peak, abs=1e-12)
    assert learning_rate(training, training.total_steps - 1) == pytest.approx(curve.last, abs=1e-12)


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_follows_the_paper(name: str) -> None:
    training = load(name).training
    total, warmup = training.total_steps, training.warmup_steps
    steps = (0, warmup - 1, (warmup + total) // 2 - 1, total - 1)
    curve = Curve(total, warmup, *(learning_rate(training, step) for step in steps))
    print(f"{name}: {curve}")
    assert [*curve] == pytest.approx([*PRETRAINING[name]], abs=1e-12)
    assert (training.adam_betas, training.adam_epsilon, training.weight_decay) == ((0.9, 0.98), 1e-6, 0.05)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_visual_tokenizer_follows_beit_v2(name: str) -> None:
    config = load(name)
    training, visual = config.training, config.tokenizers.visual
    total, warmup = training.total_steps, training.warmup_steps
    steps = (0, warmup - 1, (warmup + total) // 2 - 1, total - 1)
    curve = Curve(total, warmup, *(learning_rate(training, step) for step in steps))
    # Catches a peak that is not scaled by the batch, and an end that is a share of the peak.
    assert [*curve] == pytest.approx([*TOKENIZERS[name]], rel=1e-9)
    assert (training.adam_betas, training.adam_epsilon, training.weight_decay) == ((0.9, 0.99), 1e-8, 1e-4)
    assert "gradient_clipping" not in config.deepspeed
    if name == "visual_tokenizer_8gpu":
        batch_size = config.data.images.samples_per_step
        assert training.learning_rate == pytest.approx(batch_size / 128 * 5e-5)
        assert (batch_size, visual.decoder_layers, visual.ema_decay) == (512, 3, 0.99)


def test_weight_decay_spares_biases_norms_and_positions_of_the_visual_tokenizer() -> None:
    config = load("quickstart_visual_tokenizer_cpu")
    names = [name for name, _ in build_task(config).build_model().named_parameters()]
    spared = {name for name in names if not parameter_group(name, config).weight_decay}
    assert {"encoder.pos_embed", "decoder.cls_token", "encoder.norm.weight", "decode_task_layer.0.bias"} <= spared
    assert "encoder.blocks.0.norm1.weight" in spared
    assert {"encoder.patch_embed.proj.weight", "encoder.blocks.0.attn.qkv.weight"} <= set(names) - spared


@given(
    st.integers(0, 40),
    st.integers(1, 60),
    st.floats(1e-6, 1.0),
    st.floats(0.0, 1.0),
)
def test_schedule_rises_to_its_peak_and_falls_to_its_minimum(
    warmup_steps: int, cosine_steps: int, peak: float, share: float
) -> None:
    minimum, total = share * peak, warmup_steps + cosine_steps
    schedule = {"peak": peak, "minimum": minimum, "warmup_steps": warmup_steps, "total_steps": total}
    rates = [warmup_then_decay(step, **schedule) for step in range(total + 2)]
    rise, fall = rates[:warmup_steps], rates[warmup_steps:]
    assert rise == pytest.approx([peak * (step + 1) / warmup_steps for step in range(warmup_steps)])
    # Catches a cosine that is one step early or late: it ends at the last step, and not before.
    assert rates[total - 1 :] == pytest.approx([minimum] * 3)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(fall))
    if cosine_steps > 1 and share < 0.9:
        assert rates[total - 2] > minimum


def test_a_minimum_above_the_peak_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"min_learning_rate=0.01 exceeds learning_rate=0.003"):
        load_run_config(FOLDER / "quickstart_cpu.json", ["training.min_learning_rate=0.01"])


def test_poly_falls_in_a_straight_line() -> None:
    schedule = {"peak": 2.0, "minimum": 1.0, "warmup_steps": 2, "total_steps": 6}
    rates = [warmup_then_decay(step, **schedule, decay="poly") for step in range(8)]
    assert rates == pytest.approx([1.0, 2.0, 1.75, 1.5, 1.25, 1.0, 1.0, 1.0])
