"""Tests training of the visual tokenizer: its schedule, its file, and the quality of its codes on the sample."""

import dataclasses
import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from beit3_ds.config import ConfigError, RunConfig, load_run_config
from beit3_ds.data import TokenizerImages, View
from beit3_ds.tokenizers import VisualTokenizer, load_visual_tokenizer
from beit3_ds.training.code_usage import CodeUsage, measure_code_usage
from beit3_ds.training.visual_tokenizer import (
    build_tokenizer_optimizer,
    train_visual_tokenizer,
)

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "beit3_ds" / "sample_data"
QUICKSTART = ROOT / "ds_configs" / "quickstart_cpu.json"


class Views:
    """Implements a dataset of given images, in the same order in every epoch."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, position: int) -> View:
        return View(self.pixels[position % len(self.pixels)], {})


def run_config(folder: Path, seed: int = 1, **visual: int | float) -> RunConfig:
    """Returns the quickstart's configuration with another file, seed and tokenizer."""
    config = load_run_config(QUICKSTART)
    changed = dataclasses.replace(config.tokenizers.visual, path=str(folder / "visual.safetensors"), **visual)  # type: ignore[arg-type]
    return dataclasses.replace(
        config,
        tokenizers=dataclasses.replace(config.tokenizers, visual=changed),
        training=dataclasses.replace(config.training, seed=seed, log_interval=2),
    )


SMALL = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "codebook_size": 16, "batch_size": 4}
SHORT = {"training_steps": 6, "warmup_steps": 2, "continuous_steps": 3}


def random_views(count: int = 12) -> Views:
    return Views(torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1)


def test_training_writes_a_file_that_encodes(tmp_path: Path) -> None:
    lines: list[str] = []
    config = run_config(tmp_path, **SMALL, **SHORT)
    usage = train_visual_tokenizer(config, random_views(), report=lines.append)
    tokenizer = load_visual_tokenizer(config.tokenizers.visual.path)
    codes = tokenizer.encode(random_views().pixels)
    assert measure_code_usage([codes], 16) == usage  # catches the usage of another model than the one written
    assert "no codes yet" in lines[0]
    assert "codes used" in lines[-2]
    assert "visual.safetensors" in lines[-1]


def test_the_same_seed_gives_the_same_tokenizer(tmp_path: Path) -> None:
    states = []
    for name in "ab":
        config = run_config(tmp_path / name, **SMALL, **SHORT)
        torch.manual_seed(ord(name))  # catches draws from the caller's random state
        train_visual_tokenizer(config, random_views(), report=lambda line: None)
        states.append(load_visual_tokenizer(config.tokenizers.visual.path).state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_without_continuous_steps_codes_are_there_from_the_first(tmp_path: Path) -> None:
    lines: list[str] = []
    config = run_config(tmp_path, **SMALL, **(SHORT | {"continuous_steps": 0}))
    train_visual_tokenizer(config, random_views(), report=lines.append)
    assert "codes used" in lines[0]


def test_weight_decay_spares_biases_norms_and_positions(tmp_path: Path) -> None:
    tokenizer = VisualTokenizer(run_config(tmp_path, **SMALL).tokenizers.visual, teacher_width=3)
    optimizer = build_tokenizer_optimizer(tokenizer)
    spared = {id(parameter) for parameter in optimizer.param_groups[1]["params"]}
    names = {name for name, parameter in tokenizer.named_parameters() if id(parameter) in spared}
    assert {"encoder.pos_embed", "decoder.cls_token", "encoder.norm.weight", "decode_task_layer.0.bias"} <= names
    assert "encoder.patch_embed.proj.weight" not in names
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(tokenizer.parameters()))


def test_low_usage_warns_with_a_remedy(tmp_path: Path) -> None:
    white = Views(torch.ones(8, 3, 64, 64))
    with pytest.warns(UserWarning, match="Use a smaller codebook_size"):
        train_visual_tokenizer(
            run_config(tmp_path, **(SMALL | {"codebook_size": 32}), **SHORT), white, report=lambda line: None
        )


def test_images_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shape \(3, 32, 32\), image_size=64"):
        train_visual_tokenizer(run_config(tmp_path), Views(torch.zeros(4, 3, 32, 32)))
    with pytest.raises(ConfigError, match="no images"):
        train_visual_tokenizer(run_config(tmp_path), Views(torch.zeros(0, 3, 64, 64)))


def labelled_images() -> tuple[Tensor, npt.NDArray[np.str_]]:
    """Returns all images of the sample with a category, (about 616, 3, 64, 64), and the categories."""
    pixels, categories = [], []
    for split in ("train", "validation"):
        with tarfile.open(SAMPLE / f"images-{split}.tar") as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in sorted(name for name in members if name.endswith(".webp")):
            image = Image.open(io.BytesIO(members[name])).convert("RGB").resize((64, 64))
            pixels.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1)
            categories.append(json.loads(members[name.replace(".webp", ".json")])["category"])
    return torch.stack(pixels), np.array(categories)


def pixel_codes(views: Tensor, images: Tensor, num_codes: int, seed: int) -> Tensor:
    """Returns codes of the images by k-means over raw patches of `views`."""
    from sklearn.cluster import KMeans

    patches = F.unfold(views, 8, stride=8).transpose(1, 2).flatten(0, 1)
    kept = patches[torch.randperm(len(patches), generator=torch.Generator().manual_seed(seed))[:16384]]
    kmeans = KMeans(num_codes, n_init=1, max_iter=15, random_state=seed).fit(kept)
    centers = torch.from_numpy(kmeans.cluster_centers_).float()
    return torch.stack([torch.cdist(image.T, centers).argmin(1) for image in F.unfold(images, 8, stride=8)])


def probe_hits(codes: Tensor, categories: npt.NDArray[np.str_], num_codes: int, seed: int) -> npt.NDArray[np.bool_]:
    """Returns whether each image's category is predicted from its bag of codes, by five-fold cross-validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    bags = torch.stack([torch.bincount(image, minlength=num_codes) for image in codes]).float().sqrt().numpy()
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    predicted = cross_val_predict(LogisticRegression(C=0.3, max_iter=200), bags, categories, cv=folds)
    return np.asarray(predicted == categories)


@pytest.fixture(scope="module")
def trained_runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[RunConfig, CodeUsage]]:
    """Trains the quickstart's tokenizer with three seeds."""
    configs = [run_config(tmp_path_factory.mktemp("visual"), seed) for seed in range(3)]
    return [(config, train_visual_tokenizer(config, TokenizerImages(config))) for config in configs]


@pytest.mark.slow
def test_codes_of_the_sample_are_in_use(trained_runs: list[tuple[RunConfig, CodeUsage]]) -> None:
    for _, usage in trained_runs:
        assert usage.perplexity > 150, usage  # white backgrounds must not share a handful of codes
        assert usage.num_codes > 0.9 * usage.codebook_size, usage


@pytest.mark.slow
def test_codes_of_the_sample_beat_clusters_of_pixels(trained_runs: list[tuple[RunConfig, CodeUsage]]) -> None:
    images, categories = labelled_images()
    hits: dict[str, list[npt.NDArray[np.bool_]]] = {"codes": [], "pixels": []}
    for seed, (config, _) in enumerate(trained_runs):
        visual, dataset = config.tokenizers.visual, TokenizerImages(config)
        views = torch.stack([dataset[item] for item in range(1024)])
        codes = {
            "codes": load_visual_tokenizer(visual.path).encode(images),
            "pixels": pixel_codes(views, images, visual.codebook_size, seed),
        }
        for name, image_codes in codes.items():
            hits[name].append(probe_hits(image_codes, categories, visual.codebook_size, seed))
            print(f"seed {seed}: {name} {hits[name][-1].mean():.3f}", flush=True)
    difference = np.mean(hits["codes"], axis=0) - np.mean(hits["pixels"], axis=0)  # per image, averaged over the seeds
    margin = 1.96 * difference.std(ddof=1) / math.sqrt(len(difference))
    print(f"codes - pixels: {difference.mean():.3f} +- {margin:.3f}")
    assert difference.mean() - margin > 0


class ViewsWithBrokenImages(Views):
    """Implements views of which up to three come from broken images, again in every epoch."""

    def read(self, position: int) -> View:
        name = f"s.tar:{position % 3}"
        return View(super().read(position).pixels, {name: f"{name}: empty file"})


def test_broken_images_count_once_and_are_named_once(tmp_path: Path) -> None:
    lines: list[str] = []
    config = run_config(tmp_path, **SMALL, **SHORT)
    views = ViewsWithBrokenImages(random_views().pixels)
    train_visual_tokenizer(config, views, report=lines.append)
    named = [line for line in lines if "left out broken record" in line]
    assert [line.rpartition("s.tar:")[2] for line in named] == [f"{i}: empty file" for i in range(3)]
    assert "broken records 3" in lines[-2]  # catches a count of reads, and a progress line without a count
    too_many = dataclasses.replace(config, data=dataclasses.replace(config.data, max_broken_records=2))
    with pytest.raises(ConfigError, match=r"3 broken records by step 1 .*max_broken_records=2"):
        train_visual_tokenizer(too_many, views, report=lines.append)
