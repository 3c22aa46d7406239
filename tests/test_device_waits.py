"""Tests how often a training step of every task waits for the device: most only read the gradient norm."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.config import TextTokenizerConfig
from beit3_ds.sample_data.write_scenes import write_scenes
from beit3_ds.tokenizers.text import train_text_tokenizer
from tests.device_waits import watching
from tests.fixtures.tokenizers import copy_tokenizers
from tests.ranks import run_ranks
from tests.run_config import small_run_mapping, visual_tokenizer_mapping
from tests.tasks.detection.test_task import TASK as DETECTION
from tests.tasks.segmentation.label_files import SETTINGS as SEGMENTATION
from tests.two_devices import two_devices

STEPS = 4
VOCABULARY = 60
TRAINING = {"total_steps": STEPS, "log_interval": STEPS, "eval_interval": STEPS, "save_interval": STEPS}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, num_train=36, num_validation=4, size=32)
    settings = TextTokenizerConfig(path=str(folder / "words.spm"), vocab_size=VOCABULARY, character_coverage=1.0)
    train_text_tokenizer(settings, (folder / "text.txt").read_text().splitlines())
    copy_tokenizers(folder)
    return folder


def write_config(task: str, scenes: Path, folder: Path, **engine: Any) -> Path:
    """Writes the configuration of a run that reports only after its last step; `engine` holds keys of DeepSpeed."""
    mapping = (TASKS | DENSE_TASKS)[task](scenes, folder) | {"gradient_clipping": 0.5} | engine
    own = mapping["beit3_ds"]
    own["training"] = {**own["training"], **TRAINING, "output_dir": str(folder / "run"), "warmup_steps": 1}
    own["data"]["num_workers"] = 0
    path = folder / "config.json"
    path.write_text(json.dumps(mapping))
    return path


def pretraining(scenes: Path, folder: Path) -> dict[str, Any]:
    mapping = small_run_mapping(0, accumulation=2, image_size=32, visual_vocab_size=32, drop_path_rate=0.5)
    visual = {"path": str(scenes / "visual.safetensors"), "image_size": 32, "codebook_size": 32}
    tokenizers = mapping["beit3_ds"]["tokenizers"]
    tokenizers["text"] |= {"path": str(scenes / "text.spm"), "vocab_size": 120}
    tokenizers["visual"] |= visual
    return mapping


def fine_tuning(task: dict[str, Any], inputs: list[str], data: Callable[[Path], dict[str, Any]]) -> Any:
    def mapping_of(scenes: Path, folder: Path) -> dict[str, Any]:
        model = {"image_size": 32, "drop_path_rate": 0.2, "inputs": inputs, "text_vocab_size": VOCABULARY + 4}
        mapping = small_run_mapping(0, accumulation=2, **model)
        own = mapping["beit3_ds"]
        own["task"] = task
        own["data"] = {**data(scenes), "text_length": 24, "pair_text_length": 24}
        own["tokenizers"] = {"text": {"path": str(scenes / "words.spm"), "vocab_size": VOCABULARY}}
        return mapping

    return mapping_of


def pairs(file: str, form: str, **keys: str) -> Callable[[Path], dict[str, Any]]:
    def sources(scenes: Path) -> dict[str, Any]:
        train, validation = (
            [{"path": str(scenes / file.format(split)), "format": form, "images": str(scenes)}]
            for split in ("train", "validation")
        )
        if keys:
            train[0] |= {"split": keys["train"]}
            validation[0] |= {"split": keys["validation"]}
        return {"pairs": {"train": train, "validation": validation, "samples_per_step": 8}}

    return sources


def classes(texts: int) -> Callable[[Path], dict[str, Any]]:
    def sources(scenes: Path) -> dict[str, Any]:
        images: dict[str, Any] = {s: [str(scenes / "classes" / s)] for s in ("train", "validation")}
        names = [{"path": str(scenes / "classes.txt"), "format": "class_names"}]
        return {
            "images": images | {"samples_per_step": 8},
            "texts": {"train": names, "samples_per_step": texts},
            "random_erasing": 0.2,
        }

    return sources


def visual_tokenizer(scenes: Path, folder: Path) -> dict[str, Any]:
    mapping = visual_tokenizer_mapping(folder)
    mapping["beit3_ds"]["task"]["continuous_steps"] = 1  # the codebook starts before the step that is looked at
    return mapping


DENSE = {"image_size": 64, "patch_size": 16, "inputs": ["images"], "num_vision_language_layers": 0}


def dense(task: dict[str, Any], source: Callable[[Path, str], dict[str, str]], **model: Any) -> Any:
    def mapping_of(scenes: Path, folder: Path) -> dict[str, Any]:
        mapping = small_run_mapping(0, accumulation=2, drop_path_rate=0.2, **DENSE, **model)
        own = mapping["beit3_ds"]
        own["task"], own["tokenizers"] = task, {}
        splits = {split: [source(scenes, split)] for split in ("train", "validation")}
        own["data"] = {"images": {**splits, "samples_per_step": 2 * IMAGES}, "color_jitter": 0.0}
        return mapping

    return mapping_of


def objects(scenes: Path, split: str) -> dict[str, str]:
    return {"path": str(scenes / f"objects-{split}.json"), "format": "coco_objects", "images": str(scenes / "images")}


def label_maps(scenes: Path, split: str) -> dict[str, str]:
    folder = {"train": "training", "validation": "validation"}[split]
    return {"path": str(scenes / "segmentation"), "format": "ade20k", "split": folder}


IMAGES = 2  # per micro-batch
KARPATHY = pairs("captions.json", "karpathy", train="train", validation="val")
IMAGENET = {"name": "imagenet", "num_classes": 36}
TASKS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "pretraining": pretraining,
    "vqa": fine_tuning(
        {"name": "vqa", "num_answers": 21, "min_answer_occurrences": 1},
        ["pairs"],
        pairs("questions-{}.jsonl", "vqa_lines"),
    ),
    "nlvr2": fine_tuning({"name": "nlvr2"}, ["pairs"], pairs("statements-{}.jsonl", "statement_lines")),
    "captioning": fine_tuning(
        {"name": "captioning", "dropped_share": 0.2, "drop_after_steps": 2, "generation": "never"}, ["pairs"], KARPATHY
    ),
    "retrieval": fine_tuning({"name": "retrieval", "mask_duplicates": True}, ["images", "texts"], KARPATHY),
    "imagenet": fine_tuning(IMAGENET | {"mixup": 0.8, "cutmix": 1.0}, ["images", "texts"], classes(36)),
    "imagenet, some classes": fine_tuning(IMAGENET, ["images", "texts"], classes(8)),
    "imagenet, linear": fine_tuning(IMAGENET | {"head": "linear"}, ["images"], classes(0)),
    "visual tokenizer": visual_tokenizer,
}

DENSE_TASKS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "detection": dense(
        {**DETECTION, "max_detections": 5, "test_flip": False},
        objects,
        dense={"window_size": 3, "global_blocks": [1], "relative_positions": True},
    ),
    "segmentation": dense(SEGMENTATION, label_maps, dense={}, final_norm=False),
    "segmentation, no adapter": dense(SEGMENTATION | {"adapter": None}, label_maps, dense={}, final_norm=True),
}


def count_waits(config: str) -> tuple[int, list[Counter[str]]]:
    """Trains on one rank; returns the exit status, and the waits between the starts of consecutive steps."""
    with two_devices() as machine:
        from beit3_ds.train import main
        from beit3_ds.training.step_feed import StepFeed

        steps: list[Counter[str]] = []
        with watching(machine) as waits:
            take = StepFeed.take

            def take_and_count(self: StepFeed) -> Any:
                steps.append(waits.clear())
                return take(self)

            StepFeed.take = take_and_count  # type: ignore[method-assign]
            return main([config]), steps


def steps_of(config: Path) -> Counter[str]:
    """Trains; returns the waits from the start of the second-to-last step to the start of the last one."""
    ((status, steps),) = run_ranks(count_waits, 1, str(config))
    assert status == 0 and len(steps) == STEPS
    return steps[-1]


@pytest.mark.parametrize("task", TASKS)
def test_a_step_waits_for_the_norm_alone(task: str, scenes: Path, tmp_path: Path) -> None:
    """Catches, for example, `drop_path.cpu()` in the model, and tensors copied from unpinned memory."""
    waits = steps_of(write_config(task, scenes, tmp_path))
    assert sum(waits.values()) == 1, waits
    assert set(waits) <= NORM


# Of a step of two micro-batches. docs/dense.md gives the reasons.
NORM = {"_local_scalar_dense in engine.py:apply_update", "cpu in host_norm.py:<lambda>"}
DECODER = SEGMENTATION["decoder"]
MASKS = {
    "cpu in mask_loss.py:forward": 2 * IMAGES * (DECODER["num_query_layers"] + 1),
    "as_tensor from pageable memory in mask_decoder.py:forward": 2,
    "tensor from pageable memory in mask_decoder.py:forward": 2 * DECODER["num_pixel_layers"],
    "_local_scalar_dense in mask_decoder.py:forward": 2 * DECODER["num_pixel_layers"],
}
DENSE_WAITS: dict[str, dict[str, int]] = {
    "detection": {
        "tolist in sampling.py:sample_balanced": 2 * IMAGES * 2,
        "nonzero in proposals.py:propose": 2 * IMAGES,
        "nms in proposals.py:propose": 2 * IMAGES,
        "tolist in boxes.py:pool_boxes": 2 * 4,
    },
    "segmentation": MASKS,
    "segmentation, no adapter": MASKS,
}


@pytest.mark.parametrize("task", DENSE_WAITS)
def test_a_step_of_a_dense_task_waits_where_shapes_depend_on_predictions(
    task: str, scenes: Path, tmp_path: Path
) -> None:
    """Catches sizes, counts and seeds that are read back, and numbers that libraries copy from pageable memory."""
    waits = steps_of(write_config(task, scenes, tmp_path))
    norm = [waits.pop(name) for name in NORM & waits.keys()]
    assert norm == [1] and waits == DENSE_WAITS[task]


ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO-1": {"zero_optimization": {"stage": 1}},
    "ZeRO-2": {"zero_optimization": {"stage": 2}},
    "ZeRO-3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_waits_for_the_norm_alone(engine: str, scenes: Path, tmp_path: Path) -> None:
    waits = steps_of(write_config("pretraining", scenes, tmp_path, **ENGINES[engine]))
    assert sum(waits.values()) == 1, waits
